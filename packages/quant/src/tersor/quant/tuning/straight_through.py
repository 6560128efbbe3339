"""Straight-through estimation: weights that are learnt as if nothing rounded them."""

from dataclasses import dataclass
from typing import Any

from tersor.quant.teacher import Teacher
from tersor.quant.tuning.pv import PV


@dataclass(frozen=True)
class StraightThrough:
    """Lowers the divergence from the original model by gradients of the decoded weights, taken by weights not rounded.

    Source: arXiv:1308.3432. Each step encodes anew all of the weights that the steps so far have added up to; what is
    continuous is learnt beside. So it is `PV` with neither limits nor oblivion, and its rival.

    Args:
        code_rate: as the other arguments, that of `PV`; the codes of all weights follow.
    """

    steps: int = 100
    batch_size: int = 8
    rate: float = 2e-3
    code_rate: float = 0.15
    also: tuple[str, ...] = ("*norm", "bias")
    top_k: int | None = 256
    seed: int = 0

    def __post_init__(self) -> None:
        self._unlimited()

    def tune(self, model: Any, teacher: Teacher) -> None:
        self._unlimited().tune(model, teacher)

    def _unlimited(self) -> PV:
        return PV(
            self.steps,
            self.batch_size,
            self.rate,
            self.code_rate,
            max_code_change=1.0,
            decay=0.0,
            also=self.also,
            top_k=self.top_k,
            seed=self.seed,
        )
