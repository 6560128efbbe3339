"""DB-LLM's distillation: what the model predicts where it is in doubt counts for more."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.quant.grid import DualBinary, DualBinaryParams
from tersor.quant.linear import QuantizedLinear
from tersor.quant.teacher import Teacher
from tersor.quant.tuning.adamw import RelativeAdamW, learnable, undone_unless_better
from tersor.quant.tuning.batches import shuffled_rows
from tersor.quant.tuning.trainable import TrainableLinear, trainable


class RecodedLinear(TrainableLinear):
    """A layer whose codes are those of the weight that was quantised for the parameters as they are at each step."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        if layer.original is None:
            raise ValueError(
                "RecodedLinear needs the weight that was quantised, which layers keep only within `quantize`"
            )
        self.original = layer.original

    @property
    def params(self) -> Any:
        params = super().params
        if not isinstance(self.grid, DualBinary):
            return params
        # a1 >= -a2 >= 0: so the levels keep their order
        a1 = params.a1.clamp(min=0)
        return DualBinaryParams(a1, torch.maximum(params.a2.clamp(max=0), -a1))

    @property
    def weight(self) -> Tensor:
        with torch.no_grad():
            self.codes = self.grid.encode(self.original, self.params)
        return super().weight

    @torch.no_grad()
    def store(self) -> QuantizedLinear:
        self.codes = self.grid.encode(self.original, self.rounded())
        return super().store()


@dataclass(frozen=True)
class DeviationAware:
    """Lowers the mean of E_t^gamma KL(p_t || q_t) over tokens, p before and q after quantising (arXiv:2402.11960).

    E_t is the cross-entropy - sum p_t log q_t over its mean, over the sequences that are run together: large where teacher
    or student are in doubt. What is learnt are the continuous parameters of the grids; codes are rounded anew for them at
    each step. The paper's second term, the loss of the text itself, is left out: it would lead away from the model, to
    what little text there is.

    Args:
        gamma: 0: all tokens count the same. In two blocks of tiny-lm, 80 steps take the divergence on other text from .245
            to .1357 with 0 and .1354 with .1 in the mean of three orders of the sequences, which differ by .004.
        steps: of AdamW.
        batch_size: sequences of the calibration data for each step.
        rate: of each parameter, as a share of its root mean square; falls to zero in a straight line.
        top_k: of the teacher's predictions, those that are kept for each token (see `Teacher`); None: all.
        seed: of the order of the sequences.
    """

    gamma: float = 0.1
    steps: int = 200
    batch_size: int = 8
    rate: float = 1e-2
    top_k: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")
        for name in ("steps", "batch_size", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def tune(self, model: Any, teacher: Teacher) -> None:
        def error() -> float:
            return teacher.divergence()

        with undone_unless_better(model, error), trainable(model, RecodedLinear):
            optimizer = RelativeAdamW(learnable(model, ()), self.rate, self.steps)
            for rows in shuffled_rows(len(teacher.rows), self.batch_size, self.steps, self.seed):
                teacher.backward(rows, partial(self.loss, teacher))
                optimizer.step()

    def loss(self, teacher: Teacher, rows: Sequence[int]) -> Tensor:
        """Of each token of some rows, (tokens,), in nats."""
        divergence, entropy = torch.cat([*teacher.divergences(rows)]), torch.cat([*teacher.entropies(rows)])
        doubt = (entropy + divergence).detach()
        return (doubt / doubt.mean()).pow(self.gamma) * divergence
