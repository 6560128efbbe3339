"""Cache layers of transformers, one per decoder layer: full attention by the recipe, sliding windows as they are."""

from abc import abstractmethod
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from tersor.kvcache.history import PACKED_ATTENTION, LazyTensor
from tersor.kvcache.recipe import Recipe
from tersor.kvcache.stream import Stream, owned


class StoredLayer(CacheLayerMixin):
    """What both kinds have in common. `keys` and `values`, which transformers' layers have, stay None."""

    is_compileable = False
    is_croppable = True

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, at most `undoable`."""

    @property
    @abstractmethod
    def undoable(self) -> int:
        """How many of the last tokens `crop` can take back."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the stored tokens, (batch, heads, seq, head_dim), as the next forward will see them."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is held."""

    @abstractmethod
    def dense_nbytes(self) -> int:
        """What transformers' own layer holds for the same tokens."""

    @abstractmethod
    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Applies `f`, which acts on dimension 0, the batch."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def activate_past_recording(self) -> None:
        """From here on, nothing that `crop` needs to take tokens back exactly is dropped before `crop` is called."""
        self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        raise NotImplementedError("CompressedCache keeps its layers where they are; use DynamicCache(offloading=True)")

    prefetch = offload


class CompressedLayer(StoredLayer):
    """A full-attention layer: keys and values as the recipe says."""

    is_sliding = False

    def __init__(self, recipe: Recipe, config: PreTrainedConfig):
        super().__init__()
        self.recipe, self.config = recipe, config
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedLayer":
        # a copy belongs to the same model: it must see the attention that the model is given later
        memo[id(self.config)] = self.config
        layer = memo[id(self)] = copy(self)
        layer.__dict__ = deepcopy(self.__dict__, memo)
        return layer

    def reset(self) -> None:
        recipe = self.recipe
        self.streams = (
            Stream(recipe.key_codec, recipe.key_window, recipe.undo),
            Stream(recipe.value_codec, recipe.value_window, recipe.undo),
        )
        self.record_past = self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.recipe.check(key_states.shape[-1], value_states.shape[-1])
        super().lazy_initialization(key_states, value_states)
        for stream, x in zip(self.streams, (key_states, value_states)):
            stream.recent = x.new_empty(*x.shape[:2], 0, x.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (
            stream.append(x, self.record_past) for stream, x in zip(self.streams, (key_states, value_states))
        )
        # where gradients are wanted, they go through decoded tensors
        if self.config._attn_implementation == PACKED_ATTENTION and not torch.is_grad_enabled():
            return LazyTensor(keys), LazyTensor(values)
        return keys.dense(), values.dense()

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:
            for stream in self.streams:
                stream.crop(-tokens_to_remove)

    @property
    def undoable(self) -> int:
        return self.get_seq_length()

    def get_seq_length(self) -> int:
        return self.streams[0].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def dense(self) -> tuple[Tensor, Tensor]:
        keys, values = self.streams
        return keys.dense(), values.dense()

    def tensors(self) -> list[Tensor]:
        return [t for stream in self.streams for t in stream.tensors()] if self.is_initialized else []

    def dense_nbytes(self) -> int:
        return (
            sum(stream.length * _token_nbytes(stream.recent) for stream in self.streams) if self.is_initialized else 0
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for stream in self.streams:
                stream.map(f)


class SlidingLayer(StoredLayer):
    """A layer that attends to `sliding_window` tokens: the newest ones and `undo` more, in full precision.

    transformers' own layer keeps `sliding_window` - 1 tokens, so it can take back none once it is full.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, undo: int):
        super().__init__()
        self.sliding_window, self.undo = sliding_window, undo
        self.reset()

    def reset(self) -> None:
        self.recent: list[Tensor] = []  # keys and values, (batch, heads, tokens, head_dim); empty before the first
        self.length = 0
        self.record_past = self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.recent = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible = self._visible() + key_states.shape[2]
        self.recent = [torch.cat(pair, 2) for pair in zip(self.recent, (key_states, value_states))]
        self.length += key_states.shape[2]
        keys, values = (_last(t, visible) for t in self.recent)
        if not self.record_past:
            self._forget()
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:
            self.recent = [t[:, :, : t.shape[2] + tokens_to_remove] for t in self.recent]
            self.length += tokens_to_remove
            self._forget()

    @property
    def undoable(self) -> int:
        stored = self.recent[0].shape[2] if self.is_initialized else 0
        return stored if stored == self.length else stored - (self.sliding_window - 1)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._visible() + query_length, self.length - self._visible()

    def get_max_length(self) -> int:
        return self.sliding_window

    def dense(self) -> tuple[Tensor, Tensor]:
        keys, values = (_last(t, self._visible()) for t in self.recent)
        return keys, values

    def tensors(self) -> list[Tensor]:
        return self.recent

    def dense_nbytes(self) -> int:
        return self._visible() * sum(map(_token_nbytes, self.recent))

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        self.recent = [f(t) for t in self.recent]

    def _visible(self) -> int:
        """How many of the stored tokens the next one attends to."""
        return min(self.length, self.sliding_window - 1)

    def _forget(self) -> None:
        kept = min(self.recent[0].shape[2], self.sliding_window - 1 + self.undo)
        self.recent = [owned(_last(t, kept)) for t in self.recent]


def _last(t: Tensor, num_tokens: int) -> Tensor:
    return t[:, :, t.shape[2] - num_tokens :]


def _token_nbytes(t: Tensor) -> int:
    return t.shape[0] * t.shape[1] * t.shape[3] * t.itemsize
