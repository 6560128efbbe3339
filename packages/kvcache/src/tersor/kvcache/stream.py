"""The keys, or the values, of one layer: old tokens as codes, recent ones as they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.kvcache.recipe import Codec, Codes, Window


class Stream:
    """Tokens 0 ... `encoded` - 1 are stored as codes, tokens `length - recent.shape[2]` ... `length` - 1 as they are.

    How many are encoded is a function of `length` alone, and a group's codes are a function of its tokens alone, so
    what is stored does not tell in which steps it came. To take tokens back, the two ranges overlap: tokens that are
    encoded now, but would not be if the last `undo` had not come, are kept in both forms, and read from the codes.

    After a crop deeper than that, tokens that are left only as codes stay codes: `base` of them. From there it goes on
    as before, with groups that start at `base`.
    """

    def __init__(self, codec: Codec, window: Window, undo: int):
        self.codec, self.window = codec, window
        # codes that can be cropped to any token lose nothing by it
        self.undo = 0 if codec.lossless else undo
        self.runs: list[Codes] = []  # one; one more for each deep crop that cut a group in two
        self.recent: Tensor  # (batch, heads, tokens, head_dim); set by the layer, which sees the first tokens
        self.length = self.encoded = self.base = 0

    def append(self, x: Tensor, recording: bool) -> Tensor:
        """Stores `x` (batch, heads, new, head_dim) and returns all tokens as attention should see them, `x` exactly."""
        seen = self._join(x)
        self.recent = torch.cat([self.recent, x], 2)
        self.length += x.shape[2]
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
        if encoded != self._target(length):
            self.base = encoded
        self._crop_codes(encoded)
        self.recent = owned(self.recent[:, :, : max(0, length - first)])
        self.length = length
        self._forget()

    def dense(self) -> Tensor:
        """All tokens, (batch, heads, seq, head_dim)."""
        return self._join(self.recent[:, :, :0])

    def tensors(self) -> list[Tensor]:
        return [t for run in self.runs for t in run] + [self.recent]

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Applies `f` to every tensor held; all have the batch in dimension 0."""
        self.runs = [run._make(map(f, run)) for run in self.runs]
        self.recent = f(self.recent)

    def _target(self, length: int) -> int:
        """How many of `length` tokens are to be stored as codes."""
        group = self.codec.token_group
        return self.base + max(0, self.window.encoded(length) - self.base) // group * group

    def _join(self, x: Tensor) -> Tensor:
        kept_twice = self.recent.shape[2] - (self.length - self.encoded)
        parts = [self.codec.decode(run, x.dtype) for run in self.runs] + [self.recent[:, :, kept_twice:], x]
        parts = [part for part in parts if part.shape[2]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2) if parts else x

    def _encode(self) -> None:
        num_tokens = self._target(self.length) - self.encoded
        if num_tokens <= 0:
            return
        start = self.recent.shape[2] - (self.length - self.encoded)
        codes = self.codec.encode(self.recent[:, :, start : start + num_tokens])
        # groups are counted from the start of a run, so only whole ones can be followed by others
        if self.runs and _length(self.runs[-1]) % self.codec.token_group == 0:
            codes = codes._make(torch.cat(pair, 2) for pair in zip(self.runs.pop(), codes))
        self.runs.append(codes._make(map(owned, codes)))
        self.encoded += num_tokens

    def _crop_codes(self, encoded: int) -> None:
        while self.encoded > encoded:
            run = self.runs.pop()
            kept = max(0, _length(run) - (self.encoded - encoded))
            self.encoded -= _length(run) - kept
            if kept:
                self.runs.append(run._make(map(owned, self.codec.crop(run, kept))))

    def _forget(self) -> None:
        """Drops copies that no undo needs any more."""
        num_tokens = min(self._target(self.length - self.undo), self.encoded) - (self.length - self.recent.shape[2])
        if num_tokens > 0:
            self.recent = owned(self.recent[:, :, num_tokens:])


def _length(run: Codes) -> int:
    return run[0].shape[2]


def owned(t: Tensor) -> Tensor:
    """`t` without the rest of a larger tensor that it is a part of, which would stay in memory with it."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)
