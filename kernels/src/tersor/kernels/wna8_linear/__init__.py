"""Linear layers with weights of 1 to 8 bits in groups and activations of 8."""

import torch
from torch import Tensor

from tersor.kernels.bits import unpack_bits
from tersor.kernels.dequant_matmul import check_packed_weight
from tersor.kernels.dispatch import op


def _check(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> None:
    if x.dtype != torch.int8:
        raise TypeError(f"wna8_linear: x must be int8, got {x.dtype}; quantize_per_token makes it")
    if not x_scale.is_floating_point():
        raise TypeError(f"wna8_linear: x_scale must be floating point, got {x_scale.dtype}")
    if x_scale.device != x.device:
        raise ValueError(f"wna8_linear: x_scale is on {x_scale.device}, but x is on {x.device}")
    grid = {"scale": scale, "zero_point": zero_point}
    check_packed_weight("wna8_linear", x.to(torch.float16), packed, grid, bits, group_size, max_bits=8)
    groups = x.shape[-1] // group_size
    if x_scale.shape[:-1] != x.shape[:-1] or x_scale.dim() != x.dim() or x_scale.shape[-1] not in (1, groups):
        raise ValueError(
            f"wna8_linear: x_scale must be (..., 1) or (..., in / group_size) = {(*x.shape[:-1], groups)}, got "
            f"{tuple(x_scale.shape)}"
        )
    if group_size >= 2**16:
        # 2^31 / (128 * 255)
        raise ValueError(
            f"wna8_linear: sums of group_size = {group_size} products may not fit in int32; use below 2^16"
        )


@op(
    "(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor zero_point, int bits, int group_size) -> Tensor",
    check=_check,
    fake=lambda x, x_scale, packed, *grid: x_scale.new_empty(*x.shape[:-1], len(packed)),
    no_gradient="detach the scales, or multiply dequantised tensors",
)
def wna8_linear(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor:
    """(x * x_scale) @ W^T (..., out) with W = (codes - zero_point) * scale, (out, in): `dequant_matmul` for x of int8.

    Sums of x times codes over a group are integers, and exact; groups add up in float32 (float64 for float64). The
    result is rounded once to the dtype of `x_scale`. It has no gradient: x is integer. Asking for that of a scale raises
    in the backward pass.

    Args:
        x: (..., in), int8, with one scale per row, (..., 1), or per group, (..., in / group_size): x_scale.
        packed: `pack_bits(codes, bits)` of codes (out, in): (out, ceil(in / 8) * bits).
        scale, zero_point: (out, in / group_size), of any floating dtype.
        bits: 1 to 8.
        group_size: input channels that share a scale; must divide `in`; below 2^16.

    >>> from tersor.kernels import pack_bits
    >>> packed = pack_bits(torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]], dtype=torch.uint8), 2)
    >>> scale, zero_point = torch.tensor([[1.0, 10.0], [1.0, 1.0]]), torch.ones(2, 2)
    >>> x, x_scale = torch.ones(1, 4, dtype=torch.int8), torch.tensor([[0.5]])
    >>> wna8_linear(x, x_scale, packed, scale, zero_point, bits=2, group_size=2)
    tensor([[14.5000,  4.0000]])
    """
    # in float64 sums of integers are exact
    groups = (x.shape[-1] // group_size, group_size)
    codes = unpack_bits(packed, bits, x.shape[-1]).unflatten(-1, groups)
    weight = (codes - zero_point[..., None].double()) * scale[..., None].double()
    rounded = x.unflatten(-1, groups) * x_scale[..., None].double()
    return (rounded.flatten(-2) @ weight.flatten(-2).T).to(x_scale.dtype)
