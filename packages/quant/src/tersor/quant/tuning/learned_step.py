"""Steps and ranges of integer grids, learnt block by block through the rounding."""

from dataclasses import dataclass
from typing import ClassVar

from tersor.quant.tuning.block_mse import BlockMSE
from tersor.quant.tuning.rounded import ClippedLinear, SteppedLinear
from tersor.quant.tuning.trainable import TrainableLinear


@dataclass(frozen=True)
class LearnedStep(BlockMSE):
    """`BlockMSE` for `IntGrid` that learns its steps as LSQ does (arXiv:1902.08153): codes follow the steps.

    The gradient of a step is scaled by 1 / sqrt(weights that share it * 2^(bits-1) - 1), as in the paper, section 2.2;
    AdamW, unlike the paper's SGD, is not moved by it. Codes are rounded to nearest: those that a solver found are lost.

    Args:
        also: none by default, as all that is learnt are the steps.
    """

    also: tuple[str, ...] = ()
    kind: ClassVar[type[TrainableLinear]] = SteppedLinear


@dataclass(frozen=True)
class LearnedClip(BlockMSE):
    """`BlockMSE` for `IntGrid` that learns how far levels reach, as OmniQuant does (arXiv:2308.13137, section 3.2).

    They span sigmoid(lower) min(w) ... sigmoid(upper) max(w) of each group, both from sigmoid(4) = .982, rounded to
    nearest: codes that a solver found are lost.

    Args:
        rate: as of `BlockMSE`: a share of 4 in each step.
        also: none by default, as all that is learnt are the ranges.
    """

    rate: float = 1e-2
    also: tuple[str, ...] = ()
    kind: ClassVar[type[TrainableLinear]] = ClippedLinear
