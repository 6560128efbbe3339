"""Attention keys: what a token offers to the others."""

from dataclasses import dataclass

from torch import Tensor

from tersor.tokencomp.recipe import Attended


@dataclass(frozen=True)
class KeyScorer:
    """Feature of a token: its attention key, averaged over heads.

    Source: arXiv:2210.09461, section 3; its table 1 compares keys with features, queries and values.
    """

    def score(self, seen: Attended) -> Tensor:
        return seen.key.mean(1)
