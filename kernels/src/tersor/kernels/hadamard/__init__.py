"""The Walsh-Hadamard transform: the cheapest rotation that spreads every input over all outputs."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op
from tersor.kernels.hadamard.matrix import hadamard_matrix, is_order, largest_block, split

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, block_size: int | None = None) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"hadamard: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("hadamard: x must have at least one dimension, got a scalar")
    n = int(x.shape[-1])
    if block_size is not None and (block_size < 1 or n % block_size):
        raise ValueError(f"hadamard: block_size = {block_size} does not divide x's last dimension, n = {n}")
    block = n if block_size is None else int(block_size)
    if block and not is_order(block):
        raise ValueError(
            f"hadamard: no Hadamard matrix of order {block} is built in (2^k, and 12, 20, 28 and others up to "
            f"252 times 2^k are); the largest block that divides n = {n} is block_size = {largest_block(n)}"
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """All bodies compute in float32 at least, and round once."""
    return torch.promote_types(x.dtype, torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    ctx.block_size = inputs[1]


def _backward(ctx, grad: Tensor):
    return hadamard(grad, ctx.block_size), None


@op(
    "(Tensor x, int? block_size=None) -> Tensor",
    check=_check,
    fake=lambda x, block_size=None: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
def hadamard(x: Tensor, block_size: int | None = None) -> Tensor:
    """x H / sqrt(block_size) over blocks of the last dimension of `x` (..., n); H has entries +1 and -1, H H^T = n I.

    The transform is orthonormal and its own inverse and gradient: every H used is symmetric. For block_size = 2^k, H is
    Sylvester's, H[i, j] = (-1)^popcount(i & j); for base * 2^k with base = 12, 20, 28, 36, ..., 252 it is the Kronecker
    product of a matrix of order `base` (Paley's where there is one, else of the propus array: 156, 172) with Sylvester's
    of order 2^k.

    Computed in float32 (float64 for float64) and rounded once to x's dtype: relative error (2-norm) <= 1e-6 in float32,
    2^-8 in bfloat16, 2^-11 in float16, where results above 65504 overflow to infinity.

    Args:
        block_size: order of H; must divide n. Default: n.

    >>> hadamard(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    tensor([2., 2., 2., 2.])
    """
    block = x.shape[-1] if block_size is None else block_size
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    base, power = split(block)
    y = x.to(compute_dtype(x)).reshape(-1, base, power)
    half = 1
    while half < power:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    if base > 1:
        y = hadamard_matrix(base, y.dtype, y.device) @ y
    return (y / power**0.5).to(x.dtype).reshape(x.shape)
