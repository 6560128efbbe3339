"""Learned rounding through a whole block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.quant.tuning.block_mse import BlockMSE
from tersor.quant.tuning.rounded import SoftlyRoundedLinear
from tersor.quant.tuning.trainable import TrainableLinear


@dataclass(frozen=True)
class BlockReconstruction(BlockMSE):
    """Chooses for each weight on an `IntGrid` one of two levels by gradients through the block (arXiv:2102.05426).

    Weights lie between the levels, h(v) from the lower to the upper one, while a regulariser drives them apart:
    strength * mean(1 - |2 h(v) - 1|^beta), beta falling from 20 to 2 (arXiv:2004.10568). The levels are the one that the
    solver chose and the next one towards the weight, so this starts from the solution layer by layer. Unlike the authors'
    code, errors are relative and the regulariser is a mean, so that one strength suits layers and models of all sizes.

    Args:
        rate: as of `BlockMSE`; v is about 1 in size.
        rates: by default the scales stay as they are.
        also: none by default.
        strength: of the regulariser.
        warm_up: share of the steps that are taken without it.
    """

    steps: int = 500
    rate: float = 3e-2
    rates: tuple[tuple[str, float], ...] = (("scale", 0.0), ("zero_point", 0.0))
    also: tuple[str, ...] = ()
    strength: float = 0.003
    warm_up: float = 0.2
    kind: ClassVar[type[TrainableLinear]] = SoftlyRoundedLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 0 and below 1, got {self.warm_up}")

    def penalty(self, layers: Mapping[str, TrainableLinear], progress: float) -> Tensor | float:
        if progress < self.warm_up:
            return 0.0
        beta = 2 + 18 * (1 - (progress - self.warm_up) / (1 - self.warm_up))
        soft = [of.h.flatten() for of in layers.values() if isinstance(of, SoftlyRoundedLinear)]
        return self.strength * (1 - (2 * torch.cat(soft) - 1).abs().pow(beta)).mean() if soft else 0.0
