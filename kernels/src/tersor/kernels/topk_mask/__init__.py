"""Which scores are among the k largest."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tersor.kernels.dispatch import op


def _check(scores: Tensor, k: Tensor) -> None:
    if scores.dtype.is_complex or scores.dtype == torch.bool:
        raise TypeError(f"topk_mask: scores must be real numbers, got {scores.dtype}")
    if k.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"topk_mask: k must be int64 or int32, got {k.dtype}")
    if k.device != scores.device and k.device.type != "cpu":
        raise ValueError(f"topk_mask: k is on {k.device}, but scores are on {scores.device}")
    if scores.dim() == 0:
        raise ValueError("topk_mask: scores must have at least one dimension, got a scalar")
    rows = scores.shape[:-1]
    if k.dim() > len(rows) or any(a not in (1, b) for a, b in zip(reversed(k.shape), reversed(rows))):
        raise ValueError(
            f"topk_mask: k must be a number or one per row of scores, {tuple(rows)}, got shape {tuple(k.shape)}"
        )


def check_range(scores: Tensor, k: Tensor) -> None:
    """Each body calls it: it reads k, which `_check` cannot do while `torch.compile` traces."""
    if k.numel():
        lowest, highest = (int(i) for i in k.aminmax())
        if lowest < 0 or highest > scores.shape[-1]:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"topk_mask: k must be 0 to n = {scores.shape[-1]}, got {wrong}")


def _int_or_tensor(call: Callable[..., Tensor]) -> Callable[[Tensor, int | Tensor], Tensor]:
    @functools.wraps(call)
    def with_tensor(scores: Tensor, k: int | Tensor) -> Tensor:
        return call(scores, k if isinstance(k, Tensor) else torch.full((), k, dtype=torch.int64, device="cpu"))

    return with_tensor


@_int_or_tensor
@op(
    "(Tensor scores, Tensor k) -> Tensor",
    check=_check,
    fake=lambda scores, k: scores.new_empty(scores.shape, dtype=torch.bool),
)
def topk_mask(scores: Tensor, k: Tensor) -> Tensor:
    """True at the k largest of each row of `scores` (..., n), exactly k times.

    Of equal scores those of lowest index are taken. As in `torch.topk`, NaN is larger than every number. A mask has no
    gradient.

    Args:
        scores: real, of any dtype.
        k: 0 ... n; a number, or integers that broadcast to the rows (...), on the scores' device or on the CPU. On a
            GPU the check of their range waits for the device.

    >>> topk_mask(torch.tensor([[3, 1, 3, 3], [0, 5, 6, 7]]), torch.tensor([2, 1]))
    tensor([[ True, False,  True, False],
            [False, False, False,  True]])
    """
    check_range(scores, k)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    among = (rank < k.to(scores.device)[..., None]).expand(scores.shape)
    return torch.zeros_like(among).scatter(-1, order, among)
