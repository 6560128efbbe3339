"""x times weights kept as packed codes on an affine grid."""

import torch
from torch import Tensor

from tersor.kernels.bits import unpack_bits
from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packed_weight(
    op: str, x: Tensor, packed: Tensor, grid: dict[str, Tensor], bits: int, group_size: int, max_bits: int
) -> None:
    """Raises unless x (..., in), packed codes (out, in) and the grid's (out, in / group_size) fit together."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"{op}: packed must be uint8, got {packed.dtype}; pack_bits makes it")
    for name, tensor in grid.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; use {name}.float()")
    for name, tensor in (("packed", packed), *grid.items()):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but x is on {x.device}")
    if not 1 <= bits <= max_bits:
        raise ValueError(f"{op}: bits must be 1 to {max_bits}, got {bits}")
    if x.dim() == 0 or packed.dim() != 2:
        raise ValueError(
            f"{op}: x must be (..., in) and packed (out, bytes), got {tuple(x.shape)} and {tuple(packed.shape)}"
        )
    out, n = packed.shape[0], x.shape[-1]
    if packed.shape[1] != (n + 7) // 8 * bits:
        raise ValueError(
            f"{op}: x has in = {n}, and {n} codes of {bits} bits take {(n + 7) // 8 * bits} bytes, but "
            f"packed has {packed.shape[1]} in a row"
        )
    if group_size < 1 or n % group_size:
        raise ValueError(f"{op}: group_size = {group_size} does not divide in = {n}")
    for name, tensor in grid.items():
        if tensor.shape != (out, n // group_size):
            raise ValueError(
                f"{op}: {name} must be (out, in / group_size) = ({out}, {n // group_size}), got {tuple(tensor.shape)}"
            )


def _check(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> None:
    grid = {"scale": scale, "zero_point": zero_point}
    check_packed_weight("dequant_matmul", x, packed, grid, bits, group_size, max_bits=8)


def _decode(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    codes = unpack_bits(packed, bits, scale.shape[1] * group_size).unflatten(-1, (scale.shape[1], group_size))
    return ((codes - zero_point[..., None].to(dtype)) * scale[..., None].to(dtype)).flatten(-2)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, zero_point, ctx.bits, ctx.group_size = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(packed, scale, zero_point)


def _backward(ctx, grad: Tensor):
    for i, name in ((2, "scale"), (3, "zero_point")):
        if ctx.needs_input_grad[i]:
            raise NotImplementedError(
                f"dequant_matmul has no gradient for {name}: detach it, or compute the weight from its codes in PyTorch"
            )
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    packed, scale, zero_point = ctx.saved_tensors
    weight = _decode(packed, scale, zero_point, ctx.bits, ctx.group_size, dtype)
    return (grad.to(dtype) @ weight).to(ctx.dtype), None, None, None, None, None


@op(
    "(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, int bits, int group_size) -> Tensor",
    check=_check,
    fake=lambda x, packed, scale, zero_point, bits, group_size: x.new_empty(*x.shape[:-1], packed.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
def dequant_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    """x @ W^T (..., out) with W = (codes - zero_point) * scale, (out, in), one scale and zero point per group of `in`.

    Sums are kept in float32 (float64 for float64) and rounded once to x's dtype. The reference and the CPU body also
    keep W in float32; the GPU body rounds W to x's dtype before it multiplies.

    The gradient is with respect to `x` only, through all of W in float32; asking for that of `scale` or `zero_point`
    raises in the backward pass.

    Args:
        x: (..., in).
        packed: `pack_bits(codes, bits)` of codes (out, in): (out, ceil(in / 8) * bits).
        scale, zero_point: (out, in / group_size), of any floating dtype.
        bits: 1 to 8.
        group_size: input channels that share a scale; must divide `in`.

    >>> from tersor.kernels import pack_bits
    >>> codes = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]], dtype=torch.uint8)
    >>> scale, zero_point = torch.tensor([[1.0, 10.0], [1.0, 1.0]]), torch.ones(2, 2)
    >>> dequant_matmul(torch.ones(4), pack_bits(codes, 2), scale, zero_point, bits=2, group_size=2)
    tensor([29.,  8.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ _decode(packed, scale, zero_point, bits, group_size, dtype).T).to(x.dtype)
