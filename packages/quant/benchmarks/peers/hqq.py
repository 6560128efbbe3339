"""HQQ of its authors, with the settings that it has by default."""

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor

from .protocol import Decoded, body

DISTRIBUTION = "hqq"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    weights = {
        name: HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False).dequantize()
        for name, linear in body(model)
    }
    # both parameters of a group are float16
    return Decoded(weights, bits + 32 / group_size)
