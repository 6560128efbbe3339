"""Linear layers with weights of 8 bits: weights only, or weights and activations."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_operands(op: str, x: Tensor, weight: Tensor, grid: dict[str, Tensor]) -> None:
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight must be int8, got {weight.dtype}; for uint8 codes use dequant_matmul")
    for name, tensor in grid.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; use {name}.float()"
            )
    for name, tensor in (("weight", weight), *grid.items()):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: x must be (..., in) and weight (out, in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )


def _check(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"int8_linear: x must be float16, bfloat16, float32 or float64, got {x.dtype}"
            + ("; w8a8_linear takes int8" if x.dtype == torch.int8 else "")
        )
    grid = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
    _check_operands("int8_linear", x, weight, grid)
    out, n = weight.shape
    if scale.dim() != 2 or scale.shape[0] != out or (n and (scale.shape[1] == 0 or n % scale.shape[1])):
        raise ValueError(
            f"int8_linear: scale must be (out, groups) = ({out}, a divisor of in = {n}), got {tuple(scale.shape)}; "
            "per channel: scale[:, None]"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"int8_linear: zero_point must have the shape of scale, {tuple(scale.shape)}, got {tuple(zero_point.shape)}"
        )


def _decode(weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight.numel() == 0:
        return weight.to(dtype)
    decoded = weight.to(dtype).unflatten(-1, (scale.shape[1], -1))
    if zero_point is not None:
        decoded = decoded - zero_point[..., None].to(dtype)
    return (decoded * scale[..., None].to(dtype)).flatten(-2)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scale, zero_point = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, scale, zero_point)


def _backward(ctx, grad: Tensor):
    # a zero point that was left out is not among them
    needed = (*ctx.needs_input_grad, False)
    for i, name in ((2, "scale"), (3, "zero_point")):
        if needed[i]:
            raise NotImplementedError(
                f"int8_linear has no gradient for {name}: detach it, or compute the weight from its codes in PyTorch"
            )
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    weight, scale, zero_point = ctx.saved_tensors
    return (grad.to(dtype) @ _decode(weight, scale, zero_point, dtype)).to(ctx.dtype), None, None, None


@op(
    "(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point=None) -> Tensor",
    check=_check,
    fake=lambda x, weight, *grid: x.new_empty(*x.shape[:-1], weight.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """x @ W^T (..., out) with W = (weight - zero_point) * scale, (out, in); each scale serves in / groups inputs.

    Sums are kept in float32 (float64 for float64) and rounded once to x's dtype. The reference and the CPU body also
    keep W in float32; the GPU body rounds W to x's dtype before it multiplies.

    The gradient is with respect to `x` only, through all of W in float32; asking for that of `scale` or `zero_point`
    raises in the backward pass.

    Args:
        x: (..., in).
        weight: (out, in), int8.
        scale: (out, groups); one group is a scale per channel. `groups` must divide `in`.
        zero_point: (out, groups); None is zero.

    >>> weight, scale = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8), torch.tensor([[1.0, 10.0]])
    >>> int8_linear(torch.ones(4), weight, scale)
    tensor([69.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ _decode(weight, scale, zero_point, dtype).T).to(x.dtype)


def _check_w8a8(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    if x.dtype != torch.int8:
        raise TypeError(f"w8a8_linear: x must be int8, got {x.dtype}; int8_linear takes floating point")
    _check_operands("w8a8_linear", x, weight, {"x_scale": x_scale, "scale": scale})
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(
            f"w8a8_linear: x_scale must have one scale per row of x, {tuple(x.shape[:-1])}, got {tuple(x_scale.shape)}"
        )
    if scale.shape != weight.shape[:1]:
        raise ValueError(
            f"w8a8_linear: scale must have one scale per row of weight, ({weight.shape[0]},), got {tuple(scale.shape)}"
        )
    if x.shape[-1] >= 2**17:
        raise ValueError(
            f"w8a8_linear: sums of in = {x.shape[-1]} products may not fit in int32; split `in` below 2^17"
        )


def scaled(product: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    """int32 sums -> product * x_scale * scale, in x_scale's dtype."""
    dtype = torch.promote_types(x_scale.dtype, torch.float32)
    return (product.to(dtype) * scale.to(dtype) * x_scale[..., None].to(dtype)).to(x_scale.dtype)


@op(
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale) -> Tensor",
    check=_check_w8a8,
    fake=lambda x, x_scale, weight, scale: x_scale.new_empty(*x.shape[:-1], weight.shape[0]),
    no_gradient="detach the scales, or multiply dequantised tensors",
)
def w8a8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(x @ weight^T) * x_scale * scale, (..., out): int8 times int8, as in SmoothQuant (arXiv:2211.10438).

    The sums are exact in int32, scaled in float32 (float64 for float64) and rounded once to the dtype of `x_scale`. It
    has no gradient: x is integer. Asking for that of a scale raises in the backward pass.

    Args:
        x: (..., in), int8; `in` below 2^17.
        x_scale: (...), one scale per row of x ("per token").
        weight: (out, in), int8.
        scale: (out,), one per output channel.

    >>> x, weight = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4], [-5, 6]], dtype=torch.int8)
    >>> w8a8_linear(x, torch.tensor([0.5]), weight, torch.tensor([1.0, 10.0]))
    tensor([[ 5.5000, 35.0000]])
    """
    # products of float64 are exact, and integer matrix products are not there on every device
    product = (x.double() @ weight.double().T).to(torch.int32)
    return scaled(product, x_scale, scale)
