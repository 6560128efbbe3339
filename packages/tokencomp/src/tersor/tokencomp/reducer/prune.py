"""Tokens that go are gone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kernels import gather_tokens
from tersor.tokencomp.state import TokenState


@dataclass(frozen=True)
class Prune:
    """The r tokens of lowest score are dropped, the others keep their order. Of equals the earlier stays."""

    def reduce(self, x: Tensor, state: TokenState, scores: Tensor, r: int) -> tuple[Tensor, TokenState]:
        if scores.shape[-1] != 1:
            raise ValueError(
                f"Prune ranks tokens by one number, the scorer gives {scores.shape[-1]} per token; use Merge"
            )
        importance = scores[..., 0].index_fill(1, torch.arange(state.num_protected, device=x.device), torch.inf)
        kept = importance.argsort(dim=-1, descending=True, stable=True)[:, : x.shape[1] - r].sort(dim=-1).values
        place = torch.full_like(state.index, -1)
        new_places = torch.arange(kept.shape[1], device=x.device).expand_as(kept)
        place = place.scatter(1, kept, new_places)
        return gather_tokens(x, kept), state.moved(state.size.gather(1, kept), kept, place)

    def limit(self, num_tokens: int, num_protected: int) -> int:
        """All but one, because a mean or an attention over nothing is not defined."""
        return max(0, num_tokens - max(num_protected, 1))

    def attention_bias(self, state: TokenState) -> Tensor | None:
        return None

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        return 0
