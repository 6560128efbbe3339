"""The keys, or the values, of one layer: old tokens as codes, recent ones as they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.kvcache.history import History, run_length
from tersor.kvcache.recipe import Codec, Codes, Window


class Stream:
    """Tokens 0 ... `encoded` - 1 are read from codes, tokens `length - recent.shape[2]` ... `length` - 1 kept as they are.

    How many are encoded is a function of `length` alone, and a group's codes are a function of its tokens alone, so
    what is stored does not tell in which steps it came. To take tokens back, the two ranges overlap: tokens that are
    encoded now, but would not be if the last `undo` had not come, are kept in both forms, and read from the codes.

    After a crop deeper than that, tokens that are left only as codes stay codes: `base` of them. From there it goes on
    as before, with groups that start at `base`.

    Codes are written a window's length at a time, so a step seldom writes any: where the window slides, some of its
    tokens have codes that are not read yet. Codes of keys and of values behind windows of one length end at one token,
    and attention reads them in place.
    """

    def __init__(self, codec: Codec, window: Window, undo: int):
        self.codec, self.window = codec, window
        # codes that can be cropped to any token lose nothing by it
        self.undo = 0 if codec.lossless else undo
        self.chunk = 0 if codec.lossless else window.residual_length
        self.runs: list[Codes] = []  # one; one more for each deep crop that cut a group in two
        self.recent: Tensor  # (batch, heads, tokens, head_dim); set by the layer, which sees the first tokens
        self.length = self.encoded = self.base = 0

    def append(self, x: Tensor, recording: bool) -> History:
        """Stores `x` (batch, heads, new, head_dim) and returns all tokens as attention should see them, `x` exactly."""
        self.recent = torch.cat([self.recent, x], 2)
        self.length += x.shape[2]
        seen = self.history()
        self._encode()
        if not recording:
            self._forget()
        return seen

    def crop(self, num_tokens: int) -> None:
        """Takes back the last `num_tokens`."""
        length = max(0, self.length - num_tokens)
        first = self.length - self.recent.shape[2]
        # encoded tokens that are still at hand are decoded by memory; the others stay codes
        encoded = max(min(self._target(length), length), min(first, length))
        written = self._written(length)
        if encoded != self._target(length):
            self.base = written = encoded
        self._crop_codes(written)
        self.recent = owned(self.recent[:, :, : max(0, length - first)])
        self.length, self.encoded = length, encoded
        self._forget()

    def history(self) -> History:
        kept_twice = self.recent.shape[2] - (self.length - self.encoded)
        return History(self.codec, tuple(self.runs), self.encoded, self.recent[:, :, kept_twice:])

    def dense(self) -> Tensor:
        """All tokens, (batch, heads, seq, head_dim)."""
        return self.history().dense()

    def tensors(self) -> list[Tensor]:
        return [t for run in self.runs for t in run] + [self.recent]

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Applies `f` to every tensor held; all have the batch in dimension 0."""
        self.runs = [run._make(map(f, run)) for run in self.runs]
        self.recent = f(self.recent)

    def _target(self, length: int) -> int:
        """How many of `length` tokens are to be read from codes."""
        group = self.codec.token_group
        return self.base + max(0, self.window.encoded(length) - self.base) // group * group

    def _written(self, length: int) -> int:
        """How many of `length` tokens are to have codes."""
        chunks = (length - self.base) // self.chunk * self.chunk if self.chunk else 0
        return max(self._target(length), self.base + chunks)

    def _encode(self) -> None:
        self.encoded = self._target(self.length)
        written = sum(map(run_length, self.runs))
        num_tokens = self._written(self.length) - written
        if num_tokens <= 0:
            return
        start = self.recent.shape[2] - (self.length - written)
        codes = self.codec.encode(self.recent[:, :, start : start + num_tokens])
        # groups are counted from the start of a run, so only whole ones can be followed by others
        if self.runs and run_length(self.runs[-1]) % self.codec.token_group == 0:
            codes = codes._make(torch.cat(pair, 2) for pair in zip(self.runs.pop(), codes))
        self.runs.append(codes._make(map(owned, codes)))

    def _crop_codes(self, written: int) -> None:
        while (excess := sum(map(run_length, self.runs)) - written) > 0:
            run = self.runs.pop()
            if (kept := run_length(run) - excess) > 0:
                self.runs.append(run._make(map(owned, self.codec.part(run, 0, kept))))

    def _forget(self) -> None:
        """Drops copies that no undo needs any more."""
        num_tokens = min(self._target(self.length - self.undo), self.encoded) - (self.length - self.recent.shape[2])
        if num_tokens > 0:
            self.recent = owned(self.recent[:, :, num_tokens:])


def owned(t: Tensor) -> Tensor:
    """`t` without the rest of a larger tensor that it is a part of, which would stay in memory with it."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)
