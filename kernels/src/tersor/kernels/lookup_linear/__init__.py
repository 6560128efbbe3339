"""x times weights kept as packed codes of a codebook of scalars."""

import torch
from torch import Tensor

from tersor.kernels.bits import unpack_bits
from tersor.kernels.dequant_matmul import check_packed_weight
from tersor.kernels.dispatch import op


def _check(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero_point: Tensor | None = None,
) -> None:
    grid = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
    check_packed_weight("lookup_linear", x, packed, grid, bits, group_size, max_bits=8)
    if not codebook.is_floating_point():
        raise TypeError(f"lookup_linear: codebook must be floating point, got {codebook.dtype}; use codebook.float()")
    if codebook.device != x.device:
        raise ValueError(f"lookup_linear: codebook is on {codebook.device}, but x is on {x.device}")
    if codebook.shape != (2**bits,):
        raise ValueError(
            f"lookup_linear: codebook must have 2^bits = {2**bits} entries, got the shape {tuple(codebook.shape)}; "
            "repeat the last entry for codes that do not occur"
        )


def _decode(
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    codes = unpack_bits(packed, bits, scale.shape[1] * group_size)
    weight = codebook.to(dtype)[codes.int()].unflatten(-1, (scale.shape[1], group_size))
    if zero_point is not None:
        weight = weight - zero_point[..., None].to(dtype)
    return (weight * scale[..., None].to(dtype)).flatten(-2)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, codebook, scale, ctx.bits, ctx.group_size, zero_point = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(packed, codebook, scale, zero_point)


def _backward(ctx, grad: Tensor):
    # a zero point that was left out is not among them
    needed = (*ctx.needs_input_grad, False)
    for i, name in ((2, "codebook"), (3, "scale"), (6, "zero_point")):
        if needed[i]:
            raise NotImplementedError(
                f"lookup_linear has no gradient for {name}: detach it, or compute the weight from its codes in PyTorch"
            )
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    packed, codebook, scale, zero_point = ctx.saved_tensors
    weight = _decode(packed, codebook, scale, ctx.bits, ctx.group_size, zero_point, dtype)
    return (grad.to(dtype) @ weight).to(ctx.dtype), None, None, None, None, None, None


@op(
    "(Tensor x, Tensor packed, Tensor codebook, Tensor scale, int bits, int group_size, Tensor? zero_point=None)"
    " -> Tensor",
    check=_check,
    fake=lambda x, packed, *others: x.new_empty(*x.shape[:-1], packed.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
def lookup_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero_point: Tensor | None = None,
) -> Tensor:
    """x @ W^T (..., out) with W = (codebook[codes] - zero_point) * scale, (out, in), per group of `in`.

    Any codebook of scalars: integers, NF4 (arXiv:2305.14314), e2m1 of MXFP4 and NVFP4, FP8, k-means, ternary. Sums are kept
    in float32 (float64 for float64) and rounded once to x's dtype. The reference and the CPU body also keep W in
    float32, but for x in bfloat16 a CPU with products of bfloat16 rounds the codebook to it; the GPU body rounds W to x's
    dtype before it multiplies.

    The gradient is with respect to `x` only, through all of W in float32; asking for that of `codebook`, `scale` or
    `zero_point` raises in the backward pass.

    Args:
        x: (..., in).
        packed: `pack_bits(codes, bits)` of codes (out, in): (out, ceil(in / 8) * bits).
        codebook: (2^bits,), of any floating dtype.
        scale: (out, in / group_size), of any floating dtype; so is `zero_point`, in units of the codebook.
        bits: 1 to 8; the CPU body is at its best up to 4.
        group_size: input channels that share a scale; must divide `in`.
        zero_point: None is zero, and faster.

    >>> from tersor.kernels import pack_bits
    >>> codes = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]], dtype=torch.uint8)
    >>> codebook, scale = torch.tensor([-1.0, 0.0, 0.5, 2.0]), torch.tensor([[1.0, 10.0], [1.0, 1.0]])
    >>> lookup_linear(torch.ones(4), pack_bits(codes, 2), codebook, scale, bits=2, group_size=2)
    tensor([24.,  8.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = _decode(packed, codebook, scale, bits, group_size, zero_point, dtype)
    return (x.to(dtype) @ weight.T).to(x.dtype)
