"""What a matcher decides."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Assignment(NamedTuple):
    """Positions in the sequence before merging: token `source[b, i]` goes into token `target[b, i]`.

    Args:
        source: (batch, r), each at most once.
        target: (batch, r), never a source.
        kept: (batch, tokens - r), all that is no source, in the order of the new sequence; the protected prefix first.
    """

    source: Tensor
    target: Tensor
    kept: Tensor


class Matcher(Protocol):
    def match(self, features: Tensor, r: int, num_protected: int) -> Assignment:
        """Choose `r` of the tokens (batch, tokens, dim) to be merged away, none of the first `num_protected`."""
        ...

    def limit(self, num_tokens: int, num_protected: int) -> int: ...

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int: ...
