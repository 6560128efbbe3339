"""Tokens picked from a sequence, row by row of the batch."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op


def _check(x: Tensor, index: Tensor) -> None:
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"gather_tokens: index must be int64 or int32, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"gather_tokens: index is on {index.device}, but x is on {x.device}")
    if x.dim() < 2 or index.dim() != 2 or len(x) != len(index):
        raise ValueError(
            f"gather_tokens: x must be (batch, tokens, ...) and index (batch, k), got {tuple(x.shape)} and "
            f"{tuple(index.shape)}"
        )


def check_range(x: Tensor, index: Tensor) -> None:
    """Each body calls it: it reads the indices, which `_check` cannot do while `torch.compile` traces."""
    if index.numel():
        lowest, highest = (int(i) for i in index.aminmax())
        if lowest < 0 or highest >= x.shape[1]:
            raise IndexError(
                f"gather_tokens: index must be 0 to {x.shape[1] - 1} for {x.shape[1]} tokens, but it holds {lowest} to "
                f"{highest}"
            )


def flat(index: Tensor, num_tokens: int) -> Tensor:
    """Where the tokens lie in the (batch * tokens, ...) of all rows: (batch * k,)."""
    offset = torch.arange(len(index), device=index.device) * num_tokens
    return (index + offset[:, None]).flatten()


def _setup_context(ctx, inputs, output) -> None:
    x, index = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    batch, num_tokens = ctx.shape[:2]
    # a token may be picked many times
    total = grad.to(torch.promote_types(grad.dtype, torch.float32)).flatten(0, 1)
    total = total.new_zeros(batch * num_tokens, *ctx.shape[2:]).index_add(0, flat(index, num_tokens), total)
    return total.to(grad.dtype).view(ctx.shape), None


@op(
    "(Tensor x, Tensor index) -> Tensor",
    check=_check,
    fake=lambda x, index: x.new_empty(*index.shape, *x.shape[2:]),
    setup_context=_setup_context,
    backward=_backward,
)
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]]: tokens `index` (batch, k) of `x` (batch, tokens, ...), of any dtype, as (batch, k, ...).

    The gradient with respect to `x` is the sum over the places that a token went to, in float32 at least.

    Args:
        index: int64 or int32, 0 ... tokens - 1, in any order, with repetitions. On a GPU the check of this range waits
            for the device.

    >>> gather_tokens(torch.tensor([[10, 11, 12], [20, 21, 22]]), torch.tensor([[2, 0], [1, 1]]))
    tensor([[12, 10],
            [21, 21]])
    """
    check_range(x, index)
    return x[torch.arange(len(x), device=x.device)[:, None], index].contiguous()
