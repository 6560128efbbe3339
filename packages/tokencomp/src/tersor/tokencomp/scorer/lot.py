"""Scores that know nothing: the baseline of every scorer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.tokencomp.recipe import Attended


@dataclass(frozen=True)
class RandomScorer:
    """Gaussian numbers, the same for each image and each forward, new ones in each layer.

    Args:
        dim: 1 for importance (`Prune`), more for features (`Merge`).
        seed: of the draw; drawn on the CPU, so that devices agree.
    """

    dim: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")

    def score(self, seen: Attended) -> Tensor:
        batch, tokens, _ = seen.x.shape
        # a prime stride keeps the layers' seeds of neighbouring seeds apart
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seen.layer)
        return torch.randn(tokens, self.dim, generator=generator).to(seen.x.device).expand(batch, -1, -1)
