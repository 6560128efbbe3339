"""Windows over the newest tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecentWindow:
    """The newest `residual_length` tokens, always; an older one is read from its codes as soon as its group is complete.

    Source: arXiv:2402.02750, section 3.3, values.
    """

    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.residual_length < 0:
            raise ValueError(f"residual_length must be 0 or more tokens, got {self.residual_length}")

    def encoded(self, seq_len: int) -> int:
        return max(0, seq_len - self.residual_length)


@dataclass(frozen=True)
class FlushedWindow:
    """seq_len mod `residual_length` tokens: the window fills up, then all of it is encoded at once.

    Source: arXiv:2402.02750, section 3.3, keys. Right after a flush no token is left in full precision.
    """

    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.residual_length < 1:
            raise ValueError(f"residual_length must be 1 token or more, got {self.residual_length}")

    def encoded(self, seq_len: int) -> int:
        return max(0, seq_len) // self.residual_length * self.residual_length
