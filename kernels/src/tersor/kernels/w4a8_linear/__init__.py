"""Linear layers with weights of 4 bits and activations of 8: products of integers."""

import torch
from torch import Tensor

from tersor.kernels.bits import unpack_bits
from tersor.kernels.dispatch import op
from tersor.kernels.int8_linear import scaled

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> None:
    groups = {"group_scale": group_scale, "zero_point": zero_point}
    groups = {name: tensor for name, tensor in groups.items() if tensor is not None}
    for name, tensor in {"x": x, **groups}.items():
        if tensor.dtype != torch.int8:
            raise TypeError(f"w4a8_linear: {name} must be int8, got {tensor.dtype}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"w4a8_linear: packed must be uint8, got {packed.dtype}; pack_bits makes it")
    for name, tensor in (("x_scale", x_scale), ("scale", scale)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"w4a8_linear: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; "
                f"use {name}.float()"
            )
    for name, tensor in {"x_scale": x_scale, "packed": packed, "scale": scale, **groups}.items():
        if tensor.device != x.device:
            raise ValueError(f"w4a8_linear: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() == 0 or packed.dim() != 2 or packed.shape[1] != (x.shape[-1] + 7) // 8 * 4:
        raise ValueError(
            "w4a8_linear: x must be (..., in) and packed (out, 4 ceil(in / 8)), got "
            f"{tuple(x.shape)} and {tuple(packed.shape)}"
        )
    out, n = len(packed), x.shape[-1]
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(
            f"w4a8_linear: x_scale must have one scale per row of x, {tuple(x.shape[:-1])}, got {tuple(x_scale.shape)}"
        )
    if scale.shape != (out,):
        raise ValueError(
            f"w4a8_linear: scale must have one scale per row of packed, ({out},), got {tuple(scale.shape)}"
        )
    for name, tensor in groups.items():
        if tensor.dim() != 2 or len(tensor) != out or (n and (tensor.shape[1] == 0 or n % tensor.shape[1])):
            raise ValueError(
                f"w4a8_linear: {name} must be (out, groups) = ({out}, a divisor of in = {n}), got {tuple(tensor.shape)}"
            )
    if len(groups) == 2 and groups["group_scale"].shape != groups["zero_point"].shape:
        raise ValueError("w4a8_linear: group_scale and zero_point must have one shape")
    if n >= 2**17:
        # 2^31 / (128 * 128)
        raise ValueError(f"w4a8_linear: sums of in = {n} products may not fit in int32; split `in` below 2^17")


def decode(packed: Tensor, n: int, group_scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The integers (out, in), int8."""
    codes = (unpack_bits(packed, 4, n) ^ 8).to(torch.int8) - 8
    if (group_scale is None and zero_point is None) or not codes.numel():
        return codes
    groups = next(tensor.shape[1] for tensor in (group_scale, zero_point) if tensor is not None)
    codes = codes.unflatten(-1, (groups, -1))
    if zero_point is not None:
        codes = codes - zero_point[..., None]
    if group_scale is not None:
        codes = codes * group_scale[..., None]
    return codes.flatten(-2)


@op(
    "(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? group_scale=None, Tensor? zero_point=None) -> Tensor",
    check=_check,
    fake=lambda x, x_scale, packed, *grid: x_scale.new_empty(*x.shape[:-1], len(packed)),
    no_gradient="detach the scales, or multiply dequantised tensors",
)
def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """(x @ weight^T) * x_scale * scale, (..., out), of integers: weight = (code - zero_point) * group_scale, (out, in).

    Codes are -8 ... 7 in two's complement, so that a code in the upper half of a byte, the other half cleared, is 16 * code
    without any arithmetic: what the CPU and GPU bodies multiply with (arXiv:2311.09550, OdysseyLLM, section 5.2); the 16 is
    shifted out of the sums. Grids of two levels (arXiv:2310.04836, DGQ) have integers in groups, too.

    The sums are exact in int32, scaled in float32 (float64 for float64) and rounded once to the dtype of `x_scale`. It
    has no gradient: x is integer. Asking for that of a scale raises in the backward pass.

    Args:
        x: (..., in), int8; `in` below 2^17 = 2^31 / (128 * 128), so that no sum overflows.
        x_scale: (...), one scale per row of x ("per token").
        packed: `pack_bits(code & 15, 4)`, (out, 4 ceil(in / 8)). Of codes 0 ... 15 around 8: `pack_bits(code, 4) ^ 0x88`.
        scale: (out,), one per output channel.
        group_scale: (out, groups), int8; every weight must fit in int8, which nobody checks. None is one.
        zero_point: (out, groups), int8; None is zero.

    >>> from tersor.kernels import pack_bits
    >>> code = torch.tensor([[3, -4], [-5, 6]], dtype=torch.int8)
    >>> packed = pack_bits(code.view(torch.uint8) & 15, 4)
    >>> x = torch.tensor([[1, 2]], dtype=torch.int8)
    >>> w4a8_linear(x, torch.tensor([0.5]), packed, torch.tensor([1.0, 10.0]))
    tensor([[-2.5000, 35.0000]])
    """
    weight = decode(packed, x.shape[-1], group_scale, zero_point)
    # products of float64 are exact, and integer matrix products are not there on every device
    product = (x.double() @ weight.double().T).to(torch.int32)
    return scaled(product, x_scale, scale)
