"""NF4 of bitsandbytes, its scales quantised once more."""

from typing import Any

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from .protocol import Decoded, body, refuse

DISTRIBUTION = "bitsandbytes"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    refuse("bitsandbytes", bits, (4,))
    weights = {}
    for name, linear in body(model):
        weight = linear.weight.data.contiguous()
        stored = quantize_4bit(weight, blocksize=group_size, compress_statistics=True, quant_type="nf4")
        weights[name] = dequantize_4bit(*stored)
    # a scale of 8 bits per group, and one of 32 bits for 256 of them
    return Decoded(weights, bits + 8 / group_size + 32 / (256 * group_size))
