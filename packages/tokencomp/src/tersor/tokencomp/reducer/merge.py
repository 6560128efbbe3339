"""Tokens that go are averaged into others."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.kernels import merge_tokens
from tersor.tokencomp.matcher import Bipartite, Matcher
from tersor.tokencomp.state import TokenState


@dataclass(frozen=True)
class Merge:
    """Mean weighted by size, x_b = (s_b x_b + sum s_a x_a) / (s_b + sum s_a); sizes add.

    Source: arXiv:2210.09461, section 3. `merge_tokens` computes it as a step from one of them, in float32 at least, which
    is the same and leaves untouched tokens, and copies of one token, exactly as they were.

    Args:
        matcher: who goes into whom.
        proportional: later layers attend to a token with its size, softmax(q k^T / sqrt(d) + log s), as if its members
            were still there.
    """

    matcher: Matcher = field(default_factory=Bipartite)
    proportional: bool = True

    def reduce(self, x: Tensor, state: TokenState, scores: Tensor, r: int) -> tuple[Tensor, TokenState]:
        if scores.shape[-1] == 1:
            raise ValueError("Merge compares tokens by features, the scorer gives one number per token; use Prune")
        source, target, kept = self.matcher.match(scores, r, state.num_protected)
        num_tokens = kept.shape[1]
        place = torch.empty_like(state.index).scatter_(
            1, kept, torch.arange(num_tokens, device=x.device).expand_as(kept)
        )
        place.scatter_(1, source, place.gather(1, target))
        merged, size = merge_tokens(x, state.size, place, num_tokens)
        return merged, state.moved(size, kept, place)

    def limit(self, num_tokens: int, num_protected: int) -> int:
        return self.matcher.limit(num_tokens, num_protected)

    def attention_bias(self, state: TokenState) -> Tensor | None:
        # None, not zeros, while nothing is merged: the attention then is the model's own, bit by bit
        if not self.proportional or state.num_tokens == state.num_original:
            return None
        return state.size.log()

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        return self.matcher.macs(num_tokens, num_protected, dim)
