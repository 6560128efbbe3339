"""What a compressed cache is made of: how keys and values are coded, and how long they wait before that."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, dtype

from tersor.kvcache.codec import FullPrecision
from tersor.kvcache.window import RecentWindow

# What a codec returns: a NamedTuple of tensors with the batch in dimension 0 and, in dimension 2, tokens (the first) or
# tokens or groups of tokens (the others), so that the cache can select rows and append without knowing the codec.
Codes = Any


class Codec(Protocol):
    @property
    def token_group(self) -> int:
        """Tokens that are encoded together; 1: each by itself."""
        ...

    @property
    def channel_group(self) -> int:
        """head_dim must be a multiple of this; 1: any."""
        ...

    @property
    def lossless(self) -> bool: ...

    def encode(self, x: Tensor) -> Codes:
        """Codes of keys or values `x` (batch, heads, seq, head_dim); seq is a multiple of `token_group`.

        The codes of a group depend on that group alone, so it does not matter how many are encoded at once.
        """
        ...

    def decode(self, codes: Codes, dtype: dtype) -> Tensor:
        """(batch, heads, seq, head_dim) in `dtype`; the same bits at every call."""
        ...

    def part(self, codes: Codes, start: int, stop: int) -> Codes:
        """Codes of tokens `start` ... `stop` - 1, which decode as before; `start` is a multiple of `token_group`.

        The last group may be left in part.
        """
        ...


class Window(Protocol):
    @property
    def residual_length(self) -> int: ...

    def encoded(self, seq_len: int) -> int:
        """How many of the oldest of `seq_len` tokens are read from codes; never decreases with `seq_len`."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How the full-attention layers of a model are stored. The default stores all as it is.

    Args:
        key_codec: how keys are stored once they leave `key_window`. Keys come after RoPE.
        value_codec: how values are stored once they leave `value_window`.
        key_window: which keys are kept as they are.
        value_window: which values are kept as they are.
        undo: the newest tokens that `crop` can take back exactly at any time. Costs full-precision copies of that many
            tokens, and of one key window right after it was flushed. A decoder that calls `activate_past_recording`
            can take back more, whatever `undo` is.
    """

    key_codec: Codec = field(default_factory=FullPrecision)
    value_codec: Codec = field(default_factory=FullPrecision)
    key_window: Window = field(default_factory=lambda: RecentWindow(0))
    value_window: Window = field(default_factory=lambda: RecentWindow(0))
    undo: int = 16

    def __post_init__(self) -> None:
        if self.undo < 0:
            raise ValueError(f"undo must be 0 or more tokens, got {self.undo}")
        for codec, window in ((self.key_codec, self.key_window), (self.value_codec, self.value_window)):
            length, group = window.residual_length, codec.token_group
            if length % group:
                raise ValueError(
                    f"{window}: residual_length must be a multiple of the {group} tokens that {codec} encodes "
                    f"together; use {length - length % group or group} or {length + -length % group}"
                )

    def check(self, key_dim: int, value_dim: int) -> None:
        """Raises ValueError if heads of these widths cannot be encoded."""
        for name, codec, dim in (("key", self.key_codec, key_dim), ("value", self.value_codec, value_dim)):
            group = codec.channel_group
            if dim % group:
                fitting = max(g for g in range(1, group + 1) if dim % g == 0)
                raise ValueError(
                    f"{name}_codec {codec}: head_dim = {dim} is not a multiple of group_size = {group}; "
                    f"use group_size={fitting}"
                )
