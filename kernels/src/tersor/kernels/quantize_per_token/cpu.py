"""Activations rounded on the CPU: a group is in the cache when its largest magnitude is known."""

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.cpu import REORDER, array, jit
from tersor.kernels.dispatch import Declined
from tersor.kernels.quantize_per_token import num_groups

_f32 = np.float32


def quantize_per_token(
    x: Tensor, bits: int = 8, group_size: int | None = None, clip: float = 1.0
) -> tuple[Tensor, Tensor] | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    groups = num_groups(x.shape[-1], group_size)
    scale = torch.ones(*x.shape[:-1], groups, dtype=torch.float32)
    codes = torch.empty(x.shape, dtype=torch.int8)
    if x.numel():
        values = x.float().contiguous()
        top = 2 ** (bits - 1) - 1
        _round(
            array(values).reshape(scale.numel(), -1),
            array(codes).reshape(scale.numel(), -1),
            array(scale).reshape(-1),
            _f32(clip),
            _f32(top),
        )
    return codes, scale


@jit(error_model="numpy")
def _round(values, codes, scale, clip, top):
    for group in range(len(values)):
        divisor = clip * _largest(values[group]) / top
        # not of NaN, whose comparisons are false
        divisor = _f32(1) if divisor == _f32(0) else divisor
        scale[group] = divisor
        _round_group(values[group], codes[group], divisor, top)


@jit()
def _largest(values):
    """Of the magnitudes; NaN if there is one."""
    # magnitudes are in the order of their bits, and those of NaN are the largest
    bits = values.view(np.int32)
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    return np.array([largest], np.int32).view(np.float32)[0]


@jit(fastmath=REORDER - {"arcp"}, error_model="numpy")
def _round_group(values, codes, divisor, top):
    for i in range(values.size):
        code = np.rint(values[i] / divisor)
        # in this order NaN becomes `top`, not a number beyond int8
        code = code if code < top else top
        codes[i] = np.int8(np.int32(code if code > -top else -top))
