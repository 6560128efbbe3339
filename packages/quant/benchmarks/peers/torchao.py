"""torchao: rounding to nearest. Its GPTQ (prototype) needs a GPU at these bits."""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

from .protocol import Decoded, body

DISTRIBUTION = "torchao"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
    )
    quantize_(model, config)
    weights = {name: linear.weight.dequantize() for name, linear in body(model)}
    return Decoded(weights, bits + (16 + bits) / group_size)
