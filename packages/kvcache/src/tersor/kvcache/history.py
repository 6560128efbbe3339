"""All tokens of a stream at one moment, as attention should see them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tersor.kvcache.recipe import Codec, Codes

# the name under which transformers knows the attention that reads codes
PACKED_ATTENTION = "tersor_kvcache"


@dataclass(frozen=True, eq=False)
class History:
    """Older tokens as codes, then tokens as they are. Stored tensors are replaced, never changed: so it stays valid."""

    codec: Codec
    runs: tuple[Codes, ...]
    encoded: int  # tokens to be read from `runs`, which may hold more
    recent: Tensor  # (batch, heads, tokens, head_dim), all others

    def spans(self) -> Iterator[tuple[Codes, int, int]]:
        """Each run of codes, its first token, and the one after its last."""
        last = 0
        for run in self.runs:
            first, last = last, last + run_length(run)
            yield run, first, last

    def dense(self, start: int = 0) -> Tensor:
        """Tokens from `start` on, (batch, heads, seq, head_dim)."""
        parts = []
        for run, first, last in self.spans():
            left_out, stop = max(0, start - first), min(last, self.encoded) - first
            if left_out < stop:
                # decoding starts at a group's first token
                inside_group = left_out % self.codec.token_group
                codes = self.codec.part(run, left_out - inside_group, stop)
                parts.append(self.codec.decode(codes, self.recent.dtype)[:, :, inside_group:])
        parts.append(self.recent[:, :, max(0, start - self.encoded) :])
        parts = [part for part in parts if part.shape[2]] or parts[-1:]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class LazyTensor(Tensor):
    """`history.dense()` as a tensor, decoded when the first operation reads it: shape and dtype cost nothing.

    What a layer gives to the attention that reads codes, through models that only pass it on. Whatever else comes
    across it sees the tokens. It has no gradient.
    """

    history: History

    # results are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, history: History) -> "LazyTensor":
        batch, heads, recent, head_dim = history.recent.shape
        shape = batch, heads, history.encoded + recent, head_dim
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=history.recent.dtype, device=history.recent.device)
        self.history = history
        return self

    @cached_property
    def dense(self) -> Tensor:
        return self.history.dense()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        args, kwargs = tree_map_only(cls, lambda lazy: lazy.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def run_length(run: Codes) -> int:
    return run[0].shape[2]
