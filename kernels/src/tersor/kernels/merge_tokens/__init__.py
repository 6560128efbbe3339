"""Tokens averaged into fewer."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, size: Tensor, place: Tensor, num_tokens: int) -> None:
    for name, tensor in (("x", x), ("size", size)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"merge_tokens: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if place.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"merge_tokens: place must be int64 or int32, got {place.dtype}")
    for name, tensor in (("size", size), ("place", place)):
        if tensor.device != x.device:
            raise ValueError(f"merge_tokens: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() < 2:
        raise ValueError(f"merge_tokens: x must be (batch, tokens, ...), got {tuple(x.shape)}")
    for name, tensor in (("size", size), ("place", place)):
        if tensor.shape != x.shape[:2]:
            raise ValueError(
                f"merge_tokens: {name} must be (batch, tokens) = {tuple(x.shape[:2])}, got {tuple(tensor.shape)}"
            )
    if num_tokens < 0:
        raise ValueError(f"merge_tokens: num_tokens must not be negative, got {num_tokens}")


def check_range(place: Tensor, num_tokens: int) -> None:
    """Each body calls it: it reads the places, which `_check` cannot do while `torch.compile` traces."""
    if place.numel():
        lowest, highest = (int(i) for i in place.aminmax())
        if lowest < -1 or highest >= num_tokens:
            raise IndexError(
                f"merge_tokens: place must be -1 (dropped) to num_tokens - 1 = {num_tokens - 1}, but it holds {lowest} "
                f"to {highest}"
            )


def compute_dtype(x: Tensor, size: Tensor) -> torch.dtype:
    """All bodies compute in float32 at least, and round once."""
    return torch.promote_types(torch.promote_types(x.dtype, size.dtype), torch.float32)


def _fake(x: Tensor, size: Tensor, place: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    merged = x.new_empty(x.shape[0], num_tokens, *x.shape[2:])
    return merged, size.new_empty(x.shape[0], num_tokens, dtype=compute_dtype(x, size))


def _setup_context(ctx, inputs, output) -> None:
    x, size, place, _ = inputs
    ctx.save_for_backward(x, size, place, *output)


def _backward(ctx, grad: Tensor, grad_total: Tensor):
    x, size, place, merged, total = ctx.saved_tensors
    if total.shape[1] == 0:
        return torch.zeros_like(x), torch.zeros_like(size), None, None
    batch = torch.arange(len(x), device=x.device)[:, None]
    wide = total.dtype
    into = place.clamp(min=0).long()
    grad, total = grad[batch, into].to(wide), total[batch, into]
    weight = torch.where((place >= 0) & (total != 0), 1 / total, 0)
    grad_x = grad_size = None
    if ctx.needs_input_grad[0]:
        share = (weight * size).view(*place.shape, *(1,) * (x.dim() - 2))
        grad_x = (grad * share).to(x.dtype)
    if ctx.needs_input_grad[1]:
        if merged.dtype != wide:
            # differences from a mean that was rounded are mostly its rounding
            merged, _ = merge_tokens(x.to(wide), size, place, merged.shape[1])
        pull = (grad * (x.to(wide) - merged[batch, into])).reshape(*place.shape, x.shape[2:].numel()).sum(-1)
        grad_size = (weight * pull + torch.where(place >= 0, grad_total[batch, into], 0)).to(size.dtype)
    return grad_x, grad_size, None, None


@op(
    "(Tensor x, Tensor size, Tensor place, SymInt num_tokens) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
def merge_tokens(x: Tensor, size: Tensor, place: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Means weighted by size, y_j = sum size_i x_i / sum size_i over the tokens i with place_i = j, and the new sizes.

    So tokens are merged in arXiv:2210.09461, section 3 (`place` then sends two tokens of a pair to one place), but also
    clusters, or all the rest into one. Computed as x_f + sum size_i (x_i - x_f) / sum size_i from the first token f of
    each place, in float32 at least: a token that stays alone, and copies of one token, keep their value exactly. Where
    the sizes add up to 0, as in a place without tokens, y_j = 0.

    Gradients: of `x` and of `size`.

    Args:
        x: (batch, tokens, ...).
        size: (batch, tokens), how many tokens each one stands for, or any other weight.
        place: (batch, tokens), int64 or int32: the new position of each token, 0 ... num_tokens - 1, or -1 to drop it.
            On a GPU the check of this range waits for the device.
        num_tokens: how many there are afterwards.

    Returns:
        (batch, num_tokens, ...) in x's dtype, and the sums of sizes (batch, num_tokens) in float32 (float64, if x
        or size is).

    >>> x, size = torch.tensor([[[1.0], [2.0], [6.0], [9.0]]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]])
    >>> merge_tokens(x, size, torch.tensor([[0, 1, 1, -1]]), 2)
    (tensor([[[1.],
             [5.]]]), tensor([[1., 4.]]))
    """
    check_range(place, num_tokens)
    merged, total = _fake(x, size, place, num_tokens)
    if not place.numel():
        return merged.zero_(), total.zero_()
    batch = torch.arange(len(x), device=x.device)[:, None]
    token = torch.arange(x.shape[1], device=x.device).expand_as(place)
    # one place more, for the tokens that are dropped
    place = place.where(place >= 0, num_tokens).long()
    total = total.new_zeros(len(x), num_tokens + 1).scatter_add(1, place, size.to(total.dtype))
    first = torch.zeros_like(total, dtype=torch.long).scatter_reduce(1, place, token, "amin", include_self=False)
    base = x[batch, first].to(total.dtype)
    share = (size / total[batch, place]).view(*place.shape, *(1,) * (x.dim() - 2))
    step = (x - base[batch, place]) * share
    step[token == first[batch, place]] = 0  # also for infinity
    merged = base.index_put((batch, place), step, accumulate=True)
    merged[total == 0] = 0
    return merged[:, :num_tokens].to(x.dtype).contiguous(), total[:, :num_tokens].contiguous()
