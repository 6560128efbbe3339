"""Who stands for whom while tokens become fewer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kernels import gather_tokens


@dataclass(frozen=True)
class TokenState:
    """What the tokens of one forward stand for; the tokens themselves are passed beside it.

    The first `num_protected` tokens (class, distillation, register) are never reduced and keep their places.
    As long as tokens are only merged, `size.sum(1)` is the number of original tokens; pruning takes mass away.

    Args:
        size: (batch, tokens), float32 at least: how many original tokens each token stands for.
        index: (batch, tokens): position of each token's representative before any reduction.
        source: (batch, original tokens): the token that each original token is part of now, -1 where it was pruned.
        num_protected: length of the protected prefix.
    """

    size: Tensor
    index: Tensor
    source: Tensor
    num_protected: int = 0

    @classmethod
    def start(cls, x: Tensor, num_protected: int) -> "TokenState":
        """Every token of `x` (batch, tokens, dim) stands for itself."""
        batch, tokens, _ = x.shape
        place = torch.arange(tokens, device=x.device).expand(batch, tokens)
        return cls(torch.ones(batch, tokens, device=x.device), place, place, num_protected)

    @property
    def num_tokens(self) -> int:
        return self.size.shape[1]

    @property
    def num_original(self) -> int:
        return self.source.shape[1]

    def moved(self, size: Tensor, kept: Tensor, place: Tensor) -> "TokenState":
        """The state after one reduction.

        Args:
            size: (batch, fewer tokens), sizes afterwards.
            kept: (batch, fewer tokens), the old position of each new token's representative.
            place: (batch, tokens), the new position of each old token, -1 where it is pruned.
        """
        source = place.gather(1, self.source.clamp(min=0)).where(self.source >= 0, -1)
        return TokenState(size, self.index.gather(1, kept), source, self.num_protected)

    def unmerge(self, x: Tensor) -> Tensor:
        """Each original token gets the value of the token that it is part of: (batch, original tokens, dim).

        `x` is what leaves the last layer (or anything computed from it token by token), for dense outputs and pictures.
        """
        if (self.source < 0).any():
            raise ValueError("some tokens were pruned, so no token holds their value; unmerge needs a merging reducer")
        return gather_tokens(x, self.source)
