"""GPTQ of GPTQModel, columns in the order of their inputs' sizes."""

import os
from typing import Any

# of two cores it takes one, and then asks for two when it is imported
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from torch import Tensor

from .protocol import Decoded, body, refuse

DISTRIBUTION = "gptqmodel"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    refuse("GPTQModel", bits, (2, 3, 4, 8))
    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        desc_act=True,
        sym=False,
        # zero points as they are: in the older format they are less by one until the file is read again
        format="gptq_v2",
        device="cpu",
        offload_to_disk=False,
    )
    loaded = GPTQModel.load(model.name_or_path, config, dtype=torch.float32)
    loaded.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration], batch_size=8)
    weights = {name: layer.dequantize_weight().T for name, layer in body(loaded.model)}
    return Decoded(weights, bits + (16 + bits) / group_size)
