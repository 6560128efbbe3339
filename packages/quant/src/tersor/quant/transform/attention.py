"""Attention maps, of any block that computes them in PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# logits (batch, heads, query, key) of an attention, computed only when they are asked for
Attention = Callable[[], Tensor]


@contextmanager
def attentions() -> Iterator[list[Attention]]:
    """Inside, every attention is noted: each `scaled_dot_product_attention`, and each softmax of (batch, heads, query, key)."""
    with _Noting() as noting:
        yield noting.found


def divergence(of: Sequence[Attention], other: Sequence[Attention], mask: Tensor | None) -> Tensor | float:
    """KL(p || q) + KL(q || p), in nats, of the rows of attention maps: mean over rows, sum over maps.

    Args:
        mask: (batch, query), true where a token is no padding.
    """
    total: Tensor | float = 0.0
    for one, two in zip(of, other, strict=True):
        log_p, log_q = one().log_softmax(-1), two().log_softmax(-1)
        of_rows = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean(1)
        total = total + (of_rows if mask is None else of_rows[mask]).mean()
    return total


class _Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.found.append(partial(_logits, *args, **kwargs))
        elif func is F.softmax and args[0].ndim == 4:
            self.found.append(partial(_finite, args[0]))
        return func(*args, **kwargs)


def _logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return _finite(logits)


def _finite(logits: Tensor) -> Tensor:
    """What is masked has a logit that is finite, or its part in a divergence would be 0 * (inf - inf)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.clamp(min=torch.finfo(logits.dtype).min / 4)
