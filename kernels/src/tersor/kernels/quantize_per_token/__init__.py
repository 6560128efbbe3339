"""Activations rounded to integers as they come."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, bits: int = 8, group_size: int | None = None, clip: float = 1.0) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"quantize_per_token: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("quantize_per_token: x must be (..., in), got a number")
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_per_token: bits must be 2 to 8, got {bits}")
    if group_size is not None and (group_size < 1 or x.shape[-1] % group_size):
        raise ValueError(f"quantize_per_token: group_size = {group_size} does not divide in = {x.shape[-1]}")
    if not 0 < clip <= 1:
        raise ValueError(f"quantize_per_token: clip must be above 0 and at most 1, got {clip}")


def num_groups(n: int, group_size: int | None) -> int:
    return 1 if group_size is None else n // group_size


def _fake(x: Tensor, bits: int = 8, group_size: int | None = None, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    groups = num_groups(x.shape[-1], group_size)
    scale = x.new_empty(*x.shape[:-1], groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), scale


@op(
    "(Tensor x, int bits=8, int? group_size=None, float clip=1.0) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    no_gradient="round with a straight-through estimator in PyTorch",
)
def quantize_per_token(
    x: Tensor, bits: int = 8, group_size: int | None = None, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes round(x / scale), ties to even, and scale = clip max|x| / (2^(bits-1) - 1) of each token and group.

    "Per-token dynamic" quantisation, symmetric: x is about codes * scale. The scale of zeros is 1. A group with NaN has
    the scale NaN, one with an infinity an infinite one, and their codes mean nothing. It has no gradient.

    Args:
        x: (..., in).
        bits: 2 to 8.
        group_size: channels that share a scale; must divide `in`. None: all of a token.
        clip: share of the largest magnitude that is not clipped.

    Returns:
        codes (..., in), int8, of -(2^(bits-1) - 1) and more; scale (..., groups), float32 (float64 for float64).

    >>> quantize_per_token(torch.tensor([[1.0, -2.0, 127.0]]))
    (tensor([[  1,  -2, 127]], dtype=torch.int8), tensor([[1.]]))
    """
    grouped = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = grouped.reshape(*x.shape[:-1], num_groups(x.shape[-1], group_size), group_size or x.shape[-1])
    top = 2 ** (bits - 1) - 1
    largest = grouped.abs().amax(-1) if grouped.shape[-1] else grouped.new_zeros(grouped.shape[:-1])
    scale = clip * largest / top
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (grouped / scale[..., None]).nan_to_num(0.0).round().clamp(-top, top)
    return codes.to(torch.int8).reshape(x.shape).contiguous(), scale
