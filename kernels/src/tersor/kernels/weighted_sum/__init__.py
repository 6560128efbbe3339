"""A weighted sum of stored features."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(weights: Tensor, history: Sequence[Tensor]) -> None:
    if not history:
        raise ValueError("weighted_sum: history is empty, so the shape of the sum is unknown")
    newest = history[0]
    if newest.dtype not in _DTYPES:
        raise TypeError(f"weighted_sum: history[0] must be float16, bfloat16, float32 or float64, got {newest.dtype}")
    if not weights.is_floating_point():
        raise TypeError(f"weighted_sum: weights must be floating point, got {weights.dtype}; use weights.float()")
    if weights.device != newest.device:
        raise ValueError(f"weighted_sum: weights are on {weights.device}, but history[0] is on {newest.device}")
    for j, feature in enumerate(history):
        if (feature.shape, feature.dtype, feature.device) != (newest.shape, newest.dtype, newest.device):
            raise ValueError(
                f"weighted_sum: history[{j}] is {tuple(feature.shape)}, {feature.dtype} on {feature.device}, but "
                f"history[0] is {tuple(newest.shape)}, {newest.dtype} on {newest.device}"
            )
    if weights.dim() == 0 or len(weights) != len(history):
        raise ValueError(
            f"weighted_sum: history holds {len(history)} features, so weights must be ({len(history)}, ...), got "
            f"{tuple(weights.shape)}"
        )
    each = weights.shape[1:]
    if len(each) > newest.dim() or any(a not in (1, b) for a, b in zip(reversed(each), reversed(newest.shape))):
        raise ValueError(
            f"weighted_sum: a weight of shape {tuple(each)} does not broadcast to features of shape "
            f"{tuple(newest.shape)}; one per sample is (k, batch, 1, ..., 1)"
        )


def compute_dtype(feature: Tensor) -> torch.dtype:
    """All bodies add up in float32 at least, and round once."""
    return torch.promote_types(feature.dtype, torch.float32)


def matrices(weights: Tensor, shape: torch.Size) -> tuple[Tensor, int, bool]:
    """Features of this `shape` as matrices (rows, columns), such that weights vary by row or by column, never by both.

    Returns:
        Weights (k, rows) or (k, columns); the number of columns; whether the weights vary by column.
    """
    if weights.dim() == 1:
        return weights[:, None], shape.numel(), False
    each = (1,) * (len(shape) - weights.dim() + 1) + weights.shape[1:]
    varies = [i for i, size in enumerate(each) if size > 1]
    by_column = bool(varies) and varies[-1] == len(shape) - 1
    cut = 0 if not varies else varies[0] if by_column else varies[-1] + 1
    of = shape[cut:] if by_column else shape[:cut]
    ones = (1,) * (len(shape) - cut)
    weights = weights.view(-1, *each)
    weights = weights.expand(-1, *each[:cut], *of) if by_column else weights.expand(-1, *of, *ones)
    return weights.reshape(len(weights), of.numel()), shape[cut:].numel(), by_column


def _setup_context(ctx, inputs, output) -> None:
    weights, history = inputs
    ctx.save_for_backward(weights, *history)


def _backward(ctx, grad: Tensor):
    weights, *history = ctx.saved_tensors
    dtype = compute_dtype(grad)
    each = weights.to(dtype)
    of_history = [(w * grad.to(dtype)).to(grad.dtype) for w in each]
    products = torch.stack([(grad.to(dtype) * feature).sum_to_size(each.shape[1:]) for feature in history])
    return products.to(weights.dtype), of_history


def _any_sequence(
    call: Callable[..., Tensor],
) -> Callable[[Tensor | Sequence[float], Tensor | Sequence[Tensor]], Tensor]:
    @functools.wraps(call)
    def with_tensors(weights: Tensor | Sequence[float], history: Tensor | Sequence[Tensor]) -> Tensor:
        history = list(history)
        if not isinstance(weights, Tensor):
            dtype, device = (compute_dtype(history[0]), history[0].device) if history else (torch.float32, None)
            weights = torch.tensor(weights, dtype=dtype, device=device)
        return call(weights, history)

    return with_tensors


@_any_sequence
@op(
    "(Tensor weights, Tensor[] history) -> Tensor",
    check=_check,
    fake=lambda weights, history: history[0].new_empty(history[0].shape),
    setup_context=_setup_context,
    backward=_backward,
)
def weighted_sum(weights: Tensor, history: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j history_j, added up in float32 (float64 for float64) and rounded once to history's dtype.

    Almost every predictor of diffusion features is such a sum (Taylor, Newton, Adams-Bashforth, ...), whose weights
    depend on times only. Memory is passed over once. A weight of 0 does not hide NaN: 0 * NaN = NaN.

    Gradients: of `weights` and of `history`.

    Args:
        weights: k numbers, or a tensor (k, ...) whose (...) broadcasts to a feature: (k,), (k, channels), or
            (k, batch, 1, ..., 1) for weights of each sample.
        history: k features of one shape and dtype, or one tensor (k, ...).

    >>> weighted_sum([2.0, -1.0], [torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])])
    tensor([5., 9.])
    """
    dtype = compute_dtype(history[0])
    total = torch.zeros(history[0].shape, dtype=dtype, device=history[0].device)
    for weight, feature in zip(weights.to(dtype), history):
        total += weight * feature.to(dtype)  # a single weight would be rounded to the feature's dtype
    return total.to(history[0].dtype)
