"""Examples with a low loss are skipped for one epoch, by lot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.datadistill.recipe import Kept


@dataclass(frozen=True)
class SoftPrune:
    """Of the n examples whose score is below the mean, a share 1 - r is kept by lot, each with weight n / kept.

    The expected weighted sum of gradients is that over all examples. Nothing is skipped before an example's first loss,
    nor in the last 1 - delta of the epochs.

    Source: arXiv:2303.04947, section 3. The paper and its code weight by 1 / (1 - r); n / kept is the exact weight
    whatever the rounding. The code keeps int((1 - r) n) examples, here it is the nearest number, at least one.

    Args:
        r: share that is skipped of the examples below the mean, 0 <= r < 1.
        delta: share of the epochs, from the first, that may skip, rounded down to whole epochs.
        ema: score = ema * old score + (1 - ema) * loss.
    """

    r: float = 0.5
    delta: float = 0.875
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.r < 1:
            raise ValueError(
                f"r must be at least 0 and below 1, got {self.r}: some must be kept to stand for the others"
            )
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be 0 to 1, got {self.delta}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")

    def select(self, scores: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Kept:
        keep, weight = torch.ones_like(scores, dtype=torch.bool), torch.ones_like(scores)
        low = (scores < scores.nanmean()).nonzero()[:, 0]  # NaN is below nothing
        # a quotient, because int(0.29 * 100) is 28
        if (epoch + 1) / epochs > self.delta or not self.r or not len(low):
            return Kept(keep, weight)  # without a draw: the order of the epoch is that of plain training
        kept = max(1, round((1 - self.r) * len(low)))
        order = low[torch.randperm(len(low), generator=generator)]
        keep[order[kept:]] = False
        weight[order[:kept]] = len(low) / kept
        return Kept(keep, weight)

    def update(self, scores: Tensor, losses: Tensor) -> Tensor:
        return torch.where(scores.isnan(), losses, self.ema * scores + (1 - self.ema) * losses)
