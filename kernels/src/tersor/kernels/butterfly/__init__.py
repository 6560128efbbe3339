"""A butterfly of Givens rotations: an orthogonal transform that can be learned, at the cost of a Hadamard transform."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, angles: Tensor, transpose: bool = False) -> None:
    for name, tensor in (("x", x), ("angles", angles)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"butterfly: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if angles.device != x.device:
        raise ValueError(f"butterfly: angles are on {angles.device}, but x is on {x.device}")
    if x.dim() == 0 or angles.dim() != 2:
        raise ValueError(
            f"butterfly: x must be (..., n) and angles (stages, n / 2), got {tuple(x.shape)} and {tuple(angles.shape)}"
        )
    n, stages = x.shape[-1], len(angles)
    if n % 2**stages:
        power = (n & -n).bit_length() - 1
        raise ValueError(f"butterfly: {stages} stages need n to be a multiple of {2**stages}; n = {n} allows {power}")
    if angles.shape[1] != n // 2:
        raise ValueError(
            f"butterfly: angles must be (stages, n / 2) = ({stages}, {n // 2}) for n = {n}, got {tuple(angles.shape)}"
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """All bodies compute in float32 at least, and round once."""
    return torch.promote_types(x.dtype, torch.float32)


def rotate(x: Tensor, angles: Tensor, stage: int) -> Tensor:
    """One stage: the pairs (i, i + 2^stage) of x (..., n) turn by `angles` (n / 2,)."""
    a, b = x.unflatten(-1, (-1, 2, 2**stage)).unbind(-2)
    cos, sin = angles.cos().view(-1, 2**stage), angles.sin().view(-1, 2**stage)
    return torch.stack([cos * a - sin * b, sin * a + cos * b], -2).flatten(-3)


def shuffled(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n / 2^stages, stages, 2^stages / 2) for stages of one shape.

    If each stage turns the neighbours (2 p, 2 p + 1) and writes the results to p and half + p, then after `stages`
    stages everything is back in its place, and all of them read and write in order.
    """
    stages = len(angles)
    per_stage = [
        angle.view(-1, 2 ** (stages - 1 - k), 2**k).mT.reshape(-1, 2 ** (stages - 1)) for k, angle in enumerate(angles)
    ]
    angles = torch.stack(per_stage, 1)
    return angles.cos(), angles.sin()


def _setup_context(ctx, inputs, output) -> None:
    x, angles, ctx.transpose = inputs
    ctx.save_for_backward(x, angles)


def _backward(ctx, grad: Tensor):
    x, angles = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return butterfly(grad, angles, not ctx.transpose), None, None
    dtype = compute_dtype(x)
    turn = (-angles if ctx.transpose else angles).to(dtype)
    stages = list(range(len(angles)))
    # the stages are undone one by one, so that only one of them is kept
    grad, y = grad.to(dtype), butterfly(x.to(dtype), angles, ctx.transpose)
    of_angles = [torch.zeros_like(turn[0])] * len(angles)
    for stage in stages if ctx.transpose else reversed(stages):
        # y = (cos a - sin b, sin a + cos b), hence dy / dangle = (-y_b, y_a)
        y_a, y_b = y.unflatten(-1, (-1, 2, 2**stage)).unbind(-2)
        grad_a, grad_b = grad.unflatten(-1, (-1, 2, 2**stage)).unbind(-2)
        product = (grad_b * y_a - grad_a * y_b).flatten(-2)
        of_angles[stage] = product.reshape(-1, product.shape[-1]).sum(0)
        grad, y = rotate(grad, -turn[stage], stage), rotate(y, -turn[stage], stage)
    of_angles = torch.stack(of_angles) if of_angles else torch.zeros_like(turn)
    return grad.to(x.dtype), (-of_angles if ctx.transpose else of_angles).to(angles.dtype), None


@op(
    "(Tensor x, Tensor angles, bool transpose=False) -> Tensor",
    check=_check,
    fake=lambda x, angles, transpose=False: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
def butterfly(x: Tensor, angles: Tensor, transpose: bool = False) -> Tensor:
    """B x over the last dimension of `x` (..., n), B = G_L ... G_2 G_1 with n / 2 rotations in each of the L stages.

    Stage k turns the pairs (x_i, x_j), j = i + 2^(k - 1), into (cos t x_i - sin t x_j, sin t x_i + cos t x_j). So B is
    orthogonal for any angles, and L = log2 n connects all inputs with all outputs (arXiv:2509.09679). Fewer stages make
    B block-diagonal, blocks of 2^L: so other widths are served, where the paper multiplies with a second matrix.

    Angles of 0 give the identity. Angles of pi / 4 give H diag((-1)^popcount(i)), H Sylvester's matrix of `hadamard`.

    Computed in float32 (float64 for float64) and rounded once to x's dtype. Gradients: of `x` and of `angles`.

    Args:
        angles: (L, n / 2), in radians; pairs in the order of their first element. 2^L must divide n.
        transpose: B^T x, which is the inverse.

    >>> quarter = torch.full((1, 1), torch.pi / 2)
    >>> butterfly(torch.tensor([1.0, 2.0]), quarter).round()
    tensor([-2.,  1.])
    """
    dtype = compute_dtype(x)
    y = x.to(dtype, copy=True)
    stages = list(enumerate(-angles.to(dtype) if transpose else angles.to(dtype)))
    for stage, angle in reversed(stages) if transpose else stages:
        y = rotate(y, angle, stage)
    return y.to(x.dtype).contiguous()
