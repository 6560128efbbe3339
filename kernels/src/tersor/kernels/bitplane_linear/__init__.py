"""Products of integers of 1 to 8 bits on both sides, bit plane by bit plane."""

import torch
from torch import Tensor

from tersor.kernels.bits import pack_bits, unpack_bits
from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# 2^15 products of at most 255 * 255 fit in int32
_MAX_GROUP = 2**15


def bit_planes(codes: Tensor, bits: int, groups: int = 1) -> Tensor:
    """Codes (..., n) as binary matrices (..., groups, bits, ceil(n / groups / 8)), uint8; the lowest bit comes first.

    Each plane is `pack_bits(codes >> i & 1, 1)` of one group's codes, padded with zeros to whole bytes.

    Args:
        codes: uint8, 0 ... 2^bits - 1. On a GPU the check of this range waits for the device.
        bits: 1 to 8.
        groups: parts of equal length that n is cut into; each of them starts at a byte.

    >>> bit_planes(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2)  # 0101, 0011, read from the lowest bit
    tensor([[[10],
             [12]]], dtype=torch.uint8)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bit_planes: bits must be 1 to 8, got {bits}")
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise TypeError(f"bit_planes: codes must be uint8 (..., n), got {codes.dtype} {tuple(codes.shape)}")
    if groups < 1 or codes.shape[-1] % groups:
        raise ValueError(f"bit_planes: n = {codes.shape[-1]} codes cannot be cut into {groups} groups")
    # the values are not there while `torch.compile` traces
    if not torch.compiler.is_compiling() and codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"bit_planes: codes of {bits} bits must be 0 to {2**bits - 1}, but the largest is {largest}")
    grouped = codes.unflatten(-1, (groups, codes.shape[-1] // groups))
    return pack_bits(grouped[..., None, :] >> _shifts(bits, codes) & 1, 1)


def plane_codes(planes: Tensor, group_size: int) -> Tensor:
    """Codes (..., groups, group_size), uint8, of `bit_planes`."""
    ones = unpack_bits(planes, 1, group_size)
    return (ones << _shifts(planes.shape[-2], planes)).sum(-2, dtype=torch.uint8)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)[:, None]


def _check_planes(op: str, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> None:
    for name, planes in (("x", x), ("weight", weight)):
        if planes.dtype != torch.uint8:
            raise TypeError(f"{op}: {name} must be uint8, got {planes.dtype}; bit_planes makes it")
    for name, tensor in (("x_scale", x_scale), ("scale", scale)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; use {name}.float()"
            )
    for name, tensor in (("x_scale", x_scale), ("weight", weight), ("scale", scale)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() < 3 or weight.dim() != 4 or x.shape[-3] != weight.shape[1] or x.shape[-1] != weight.shape[3]:
        raise ValueError(
            f"{op}: x must be planes (..., groups, x_bits, bytes) and weight (out, groups, bits, bytes), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for name, bits in (("x", x.shape[-2]), ("weight", weight.shape[2])):
        if not 1 <= bits <= 8:
            raise ValueError(f"{op}: {name} must have 1 to 8 planes, got {bits}")
    if not 1 <= group_size <= _MAX_GROUP or (group_size + 7) // 8 != x.shape[-1]:
        raise ValueError(
            f"{op}: group_size must be 1 to {_MAX_GROUP} and take the {x.shape[-1]} bytes of a plane, got {group_size}"
        )
    if x_scale.shape != x.shape[:-3]:
        raise ValueError(
            f"{op}: x_scale must have one scale per row of x, {tuple(x.shape[:-3])}, got {tuple(x_scale.shape)}"
        )
    if scale.shape != weight.shape[:2]:
        raise ValueError(f"{op}: scale must be (out, groups) = {tuple(weight.shape[:2])}, got {tuple(scale.shape)}")


def _check(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
) -> None:
    _check_planes("bitplane_linear", x, x_scale, weight, scale, group_size)
    pairs = (("x_zero_point", x_zero_point, "x_scale", x_scale), ("zero_point", zero_point, "scale", scale))
    for name, zeros, other, scales in pairs:
        if zeros.dtype != torch.uint8:
            raise TypeError(f"bitplane_linear: {name} must be uint8, got {zeros.dtype}")
        if zeros.device != x.device:
            raise ValueError(f"bitplane_linear: {name} is on {zeros.device}, but x is on {x.device}")
        if zeros.shape != scales.shape:
            raise ValueError(
                f"bitplane_linear: {name} must have the shape of {other}, {tuple(scales.shape)}, got "
                f"{tuple(zeros.shape)}"
            )


def _check_bipolar(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> None:
    _check_planes("bipolar_linear", x, x_scale, weight, scale, group_size)


def _product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Integers x (..., groups, group_size) and weight (out, groups, group_size), in float64, multiplied and scaled."""
    # sums of so many products are exact
    sums = torch.einsum("...gk,ogk->...og", x, weight)
    dtype = torch.promote_types(x_scale.dtype, torch.float32)
    y = (sums.to(dtype) * scale.to(dtype)).sum(-1)
    return (y * x_scale[..., None].to(dtype)).to(x_scale.dtype)


@op(
    "(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor scale, Tensor zero_point, int group_size)"
    " -> Tensor",
    check=_check,
    fake=lambda x, x_scale, x_zero_point, weight, *others: x_scale.new_empty(*x_scale.shape, weight.shape[0]),
    no_gradient="detach the scales, or multiply dequantised tensors",
)
def bitplane_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
) -> Tensor:
    """X W^T (..., out) with X = (x - x_zero_point) * x_scale and W = (weight - zero_point) * scale, of bit planes.

    The products of any pair of planes are sums of ones, sum_k x w = sum_ij 2^(i + j) popcount(x_i & w_j), and what the
    zero points take off needs no products but sums over either side (ABQ-LLM, arXiv:2408.08554, section 3.4). The sums
    of a group are exact; they are scaled and added up in float32 (float64 for float64), and rounded once to the dtype
    of `x_scale`. There is no gradient: x is integer. Asking for that of a scale raises in the backward pass.

    Args:
        x: `bit_planes` of codes (..., in): (..., groups, x_bits, ceil(group_size / 8)).
        x_scale: (...), one scale per row of x ("per token"); so is `x_zero_point`, uint8.
        weight: `bit_planes` of codes (out, in): (out, groups, bits, ceil(group_size / 8)).
        scale: (out, groups); so is `zero_point`, uint8.
        group_size: in / groups, at most 2^15.

    >>> x, weight = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([[0, 1, 3]], dtype=torch.uint8)
    >>> half, one = torch.tensor(0.5), torch.tensor([[1.0]])
    >>> zero_points = torch.tensor(0, dtype=torch.uint8), torch.tensor([[1]], dtype=torch.uint8)
    >>> bitplane_linear(bit_planes(x, 2), half, zero_points[0], bit_planes(weight, 2), one, zero_points[1], 3)
    tensor([2.5000])
    """
    X = plane_codes(x, group_size).double() - x_zero_point[..., None, None].double()
    W = plane_codes(weight, group_size).double() - zero_point[..., None].double()
    return _product(X, x_scale, W, scale)


@op(
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, int group_size) -> Tensor",
    check=_check_bipolar,
    fake=lambda x, x_scale, weight, *others: x_scale.new_empty(*x_scale.shape, weight.shape[0]),
    no_gradient="detach the scales, or multiply dequantised tensors",
)
def bipolar_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """X W^T (..., out), X and W odd integers times their scales: a code b of n bits is 2 b - (2^n - 1), never zero.

    Each bit is a sign, so that planes multiply as sum_k x_i w_j = K - 2 popcount(x_i ^ w_j), and nothing has to be taken
    off afterwards (Bipolar-INT, arXiv:2409.17870, section 3). Equal to `bitplane_linear` with scales twice as large and
    zero points of (2^n - 1) / 2, which are no integers. Rounding and the missing gradient as there.

    Args:
        x: `bit_planes` of codes (..., in): (..., groups, x_bits, ceil(group_size / 8)).
        x_scale: (...), one scale per row of x.
        weight: `bit_planes` of codes (out, in): (out, groups, bits, ceil(group_size / 8)).
        scale: (out, groups).
        group_size: in / groups, at most 2^15.

    >>> x, weight = torch.tensor([0, 1, 3], dtype=torch.uint8), torch.tensor([[1, 1, 0]], dtype=torch.uint8)
    >>> bipolar_linear(bit_planes(x, 2), torch.tensor(1.0), bit_planes(weight, 1), torch.tensor([[1.0]]), 3)  # -3 - 1 - 3
    tensor([-7.])
    """
    X, W = (2 * plane_codes(planes, group_size).double() - (2.0 ** planes.shape[-2] - 1) for planes in (x, weight))
    return _product(X, x_scale, W, scale)
