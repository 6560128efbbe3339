"""optimum-quanto: rounding to nearest, ranges from the extremes."""

from typing import Any

import torch
from optimum.quanto import MaxOptimizer, qint2, qint4
from torch import Tensor

from .protocol import Decoded, body, refuse

DISTRIBUTION = "optimum-quanto"


def quantise(model: Any, calibration: Tensor, bits: int, group_size: int) -> Decoded:
    refuse("optimum-quanto", bits, (2, 4))
    qtype, optimizer, weights = {2: qint2, 4: qint4}[bits], MaxOptimizer(), {}
    for name, linear in body(model):
        weight = linear.weight.data
        scale, shift = optimizer(weight, qtype, 0, group_size)
        # a packed tensor would have C++ compiled before it decodes
        codes = torch.ops.quanto.quantize_affine(weight, bits, 0, group_size, scale, shift)
        weights[name] = (codes * scale - shift).view_as(weight)
    # both parameters of a group are float16
    return Decoded(weights, bits + 32 / group_size)
