"""What the walk asks of a tuning: continuous settings of quantised layers, learnt by gradients."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from tersor.quant.calibration import BlockInputs
from tersor.quant.teacher import Teacher


@runtime_checkable
class BlockTuning(Protocol):
    """Mends a block once all its layers are quantised, so that it puts out what the original one did."""

    def tune_block(
        self,
        block: nn.Module,
        original: nn.Module,
        inputs: Sequence[BlockInputs],
        dense: Sequence[BlockInputs],
        index: int,
    ) -> None:
        """Change the quantised layers of `block` in place. Called without gradients: enable them.

        Args:
            original: the block as it was before anything of the recipe.
            inputs: what the quantised blocks before it put out: `each.run(index, block)`, (batch, seq, hidden).
            dense: what the original blocks before it put out: `each.run(index, original)` is what the model computed.
        """
        ...


@runtime_checkable
class ModelTuning(Protocol):
    """Mends the whole model once all of it is quantised, so that it predicts what the original one did."""

    @property
    def top_k(self) -> int | None:
        """Of the teacher's predictions, those that are kept (see `Teacher`)."""
        ...

    def tune(self, model: Any, teacher: Teacher) -> None:
        """Change the quantised layers of `model` in place. Called without gradients: enable them.

        Args:
            teacher: what the original predicts for the calibration data, and that data: `teacher.rows`.
        """
        ...
