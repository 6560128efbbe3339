"""x times bfloat16 weights that stay compressed: 11.1 of their 16 bits, and the very same weights."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersor.kernels.coding import check_coded, padded
from tersor.kernels.dispatch import op
from tersor.kernels.planes import plane_merge, plane_split
from tersor.kernels.tiered import tiered_decode, tiered_encode, tiered_offsets

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CompressedWeight(NamedTuple):
    sign_mantissa: Tensor  # (out, in)
    table: Tensor
    stream: Tensor
    side: Tensor
    offsets: Tensor  # (out, 2)


def compressed_weight(weight: Tensor) -> CompressedWeight:
    """What `compressed_linear` takes after x, for `weight` (out, in) in bfloat16.

    The exponents are coded in tiers, each row padded to a multiple of 64 with the most frequent one.

    >>> weight = torch.randn(256, 512).bfloat16()
    >>> compressed = compressed_weight(weight)
    >>> sum(part.nbytes for part in compressed) < 0.75 * weight.nbytes
    True
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise TypeError(
            f"compressed_weight: weight must be (out, in) in bfloat16, got {tuple(weight.shape)} in {weight.dtype}"
        )
    exponent, rest = plane_split(weight)
    length = padded(weight.shape[1], 64)
    if length > weight.shape[1] and exponent.numel():
        usual = int(torch.bincount(exponent.flatten(), minlength=256).argmax())
        exponent = pad(exponent, (0, length - weight.shape[1]), value=usual)
    coded = tiered_encode(exponent)
    if exponent.numel():
        offsets = tiered_offsets(*coded, exponent.numel(), length)
    else:
        offsets = torch.zeros(weight.shape[0], 2, dtype=torch.int64, device=weight.device)
    return CompressedWeight(rest.squeeze(0), *coded, offsets)


def _check(x: Tensor, sign_mantissa: Tensor, table: Tensor, stream: Tensor, side: Tensor, offsets: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"compressed_linear: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if sign_mantissa.dtype != torch.uint8:
        raise TypeError(f"compressed_linear: sign_mantissa must be uint8, got {sign_mantissa.dtype}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"compressed_linear: offsets must be int64, got {offsets.dtype}; tiered_offsets makes them")
    if x.dim() == 0 or sign_mantissa.dim() != 2 or x.shape[-1] != sign_mantissa.shape[1]:
        raise ValueError(
            f"compressed_linear: x must be (..., in) and sign_mantissa (out, in), got {tuple(x.shape)} and "
            f"{tuple(sign_mantissa.shape)}"
        )
    out = sign_mantissa.shape[0]
    if offsets.shape != (out, 2):
        raise ValueError(f"compressed_linear: offsets must be (out, 2) = ({out}, 2), got {tuple(offsets.shape)}")
    check_coded("compressed_linear", table, stream, side, 0)
    for name, tensor in (("sign_mantissa", sign_mantissa), ("table", table), ("offsets", offsets)):
        if tensor.device != x.device:
            raise ValueError(f"compressed_linear: {name} is on {tensor.device}, but x is on {x.device}")


def _weight(sign_mantissa: Tensor, table: Tensor, stream: Tensor, side: Tensor) -> Tensor:
    """(out, in), bfloat16."""
    out, n = sign_mantissa.shape
    length = padded(n, 64)
    exponent = tiered_decode(table, stream, side, out * length).view(out, length)[:, :n]
    return plane_merge(exponent, sign_mantissa[None], torch.bfloat16)


def _setup_context(ctx, inputs, output) -> None:
    x, *coded, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*coded)


def _backward(ctx, grad: Tensor):
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    weight = _weight(*ctx.saved_tensors).to(dtype)
    return (grad.to(dtype) @ weight).to(ctx.dtype), None, None, None, None, None


@op(
    "(Tensor x, Tensor sign_mantissa, Tensor table, Tensor stream, Tensor side, Tensor offsets) -> Tensor",
    check=_check,
    fake=lambda x, sign_mantissa, table, stream, side, offsets: x.new_empty(*x.shape[:-1], sign_mantissa.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
def compressed_linear(
    x: Tensor, sign_mantissa: Tensor, table: Tensor, stream: Tensor, side: Tensor, offsets: Tensor
) -> Tensor:
    """x @ W^T (..., out) for a W (out, in) in bfloat16 that `compressed_weight` took apart; W itself is never held.

    Source: arXiv:2504.11651 (weights without a bit lost, decoded just before the product), with tiers in place of a
    Huffman code. Sums are kept in float32 (float64 for float64) and rounded once to x's dtype; their order is not a dense
    product's. The reference and the gradient do hold W. The gradient is with respect to `x` only; the rest is bytes.

    Args:
        x: (..., in).
        sign_mantissa: (out, in), plane 1 of W.
        table, stream, side: plane 0, rows padded to a multiple of 64, from `tiered_encode`.
        offsets: (out, 2), where each row's escapes start, from `tiered_offsets`, which also checks the bytes. The
            compiled bodies only make sure that nothing outside of the tensors is read: on a GPU, offsets or bytes that
            were changed since give wrong numbers, not an error.

    >>> weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.bfloat16)
    >>> compressed_linear(torch.tensor([1.0, 1.0, 2.0]), *compressed_weight(weight))
    tensor([0., 5.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = _weight(sign_mantissa, table, stream, side).to(dtype)
    return (x.to(dtype) @ weight.T).to(x.dtype)
