"""Tokens that go are averaged into others."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.tokencomp.matcher import Bipartite, Matcher
from tersor.tokencomp.state import TokenState, rows


@dataclass(frozen=True)
class Merge:
    """Mean weighted by size, x_b = (s_b x_b + sum s_a x_a) / (s_b + sum s_a); sizes add.

    Source: arXiv:2210.09461, section 3. Computed as x_b + sum s_a (x_a - x_b) / s in float32, which is the same and
    leaves untouched tokens, and copies of one token, exactly as they were.

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
        batch = torch.arange(len(x), device=x.device)[:, None]
        place = torch.empty_like(state.index)
        place[batch, kept] = torch.arange(kept.shape[1], device=x.device)
        place[batch, source] = into = rows(place, target)

        s_a, s = rows(state.size, source), rows(state.size, kept)
        s = s.scatter_add(1, into, s_a)
        wide = torch.promote_types(x.dtype, torch.float32)
        x_a, x_b = rows(x, source).to(wide), rows(x, kept).to(wide)
        step = (x_a - rows(x_b, into)) * (s_a / s.gather(1, into))[..., None]
        merged = x_b.scatter_add(1, into[..., None].expand_as(step), step)
        return merged.to(x.dtype), state.moved(s, kept, place)

    def limit(self, num_tokens: int, num_protected: int) -> int:
        return self.matcher.limit(num_tokens, num_protected)

    def attention_bias(self, state: TokenState) -> Tensor | None:
        # None, not zeros, while nothing is merged: the attention then is the model's own, bit by bit
        if not self.proportional or state.num_tokens == state.num_original:
            return None
        return state.size.log()

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        return self.matcher.macs(num_tokens, num_protected, dim)
