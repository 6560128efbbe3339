"""x times weights kept as sums of vectors from codebooks."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = "vector_codebook_linear"


def _check(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor) -> None:
    if codes.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"{_NAME}: codes must be uint8 or uint16, got {codes.dtype}; use codes.to(torch.uint8)")
    for name, tensor in (("x", x), ("codebooks", codebooks), ("scale", scale)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{_NAME}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    for name, tensor in (("codes", codes), ("codebooks", codebooks), ("scale", scale)):
        if tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() == 0 or codes.dim() != 3 or codebooks.dim() != 3:
        raise ValueError(
            f"{_NAME}: x must be (..., in), codes (out, groups, codebooks) and codebooks (codebooks, entries, "
            f"group_size), got {tuple(x.shape)}, {tuple(codes.shape)} and {tuple(codebooks.shape)}"
        )
    (out, groups, num_codebooks), (count, entries, group_size) = codes.shape, codebooks.shape
    if num_codebooks != count or not count:
        raise ValueError(f"{_NAME}: codes are of {num_codebooks} codebooks, but codebooks holds {count}")
    if groups * group_size != x.shape[-1] or not group_size:
        raise ValueError(f"{_NAME}: x has in = {x.shape[-1]}, but codes are of {groups} groups of {group_size}")
    most = 256 ** codes.element_size()
    if not 1 <= entries <= most or entries & (entries - 1):
        raise ValueError(
            f"{_NAME}: a codebook must have 2^bits entries, at most {most} for {codes.dtype} codes, "
            f"got {entries}; repeat the last entry for codes that do not occur"
        )
    if scale.shape != (out,):
        raise ValueError(f"{_NAME}: scale must be (out,) = ({out},), got {tuple(scale.shape)}")


def _decode(codes: Tensor, codebooks: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    index = codes.int() & (codebooks.shape[1] - 1)
    weight = sum(codebook.to(dtype)[index[..., m]] for m, codebook in enumerate(codebooks))
    return weight.flatten(-2) * scale[:, None].to(dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad: Tensor):
    for i, name in ((2, "codebooks"), (3, "scale")):
        if ctx.needs_input_grad[i]:
            raise NotImplementedError(
                f"{_NAME} has no gradient for {name}: detach it, or compute the weight from its codes in PyTorch"
            )
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    codes, codebooks, scale = ctx.saved_tensors
    return (grad.to(dtype) @ _decode(codes, codebooks, scale, dtype)).to(ctx.dtype), None, None, None


@op(
    "(Tensor x, Tensor codes, Tensor codebooks, Tensor scale) -> Tensor",
    check=_check,
    fake=lambda x, codes, codebooks, scale: x.new_empty(*x.shape[:-1], codes.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
def vector_codebook_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor:
    """x @ W^T (..., out), W[o, group g] = scale[o] * sum_m codebooks[m, codes[o, g, m]]: additive quantisation.

    Source: AQLM (arXiv:2401.06118), equation 4; one codebook is plain vector quantisation. Sums are kept in float32
    (float64 for float64) and rounded once to x's dtype. The GPU body rounds W to x's dtype before it multiplies.

    The gradient is with respect to `x` only, through all of W in float32; asking for that of `codebooks` or `scale`
    raises in the backward pass.

    Args:
        x: (..., in).
        codes: (out, groups, num_codebooks), uint8 or uint16; bits beyond those of an index are ignored.
        codebooks: (num_codebooks, 2^bits, in / groups).
        scale: (out,).

    >>> codes, codebooks = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8), torch.arange(8.0).view(2, 2, 2)
    >>> codebooks[0, 1] + codebooks[1, 0], codebooks[0, 0] + codebooks[1, 1]
    (tensor([6., 8.]), tensor([6., 8.]))
    >>> vector_codebook_linear(torch.tensor([1.0, 0.0, 0.0, 1.0]), codes, codebooks, torch.tensor([0.5]))
    tensor([7.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ _decode(codes, codebooks, scale, dtype).T).to(x.dtype)
