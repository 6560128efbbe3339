"""Block-wise reconstruction: what of the grids is continuous is learnt, so that a block puts out what it did before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tersor.quant.calibration import BlockInputs, token_rows
from tersor.quant.processes import mean_over_processes, most_over_processes
from tersor.quant.tuning.adamw import RelativeAdamW, learnable, undone_unless_better
from tersor.quant.tuning.batches import shuffled
from tersor.quant.tuning.trainable import TrainableLinear, trainable


@dataclass(frozen=True)
class BlockMSE:
    """Lowers |block(x^) - y|^2 / |y|^2 by AdamW on all scales, codebooks and whatever else of a grid is continuous.

    Source: the block-wise tuning of AQLM (arXiv:2401.06118, section 3.4) and of OmniQuant (arXiv:2308.13137). Codes stay.
    A step takes one batch of the calibration data, in an order that `seed` shuffles anew for each pass over them. What
    was learnt is dropped again if, rounded as it is stored, it does not lower the error over all of the data.

    Args:
        steps: of AdamW.
        rate: of each parameter, as a share of its root mean square; falls to zero in a straight line.
        rates: (pattern, rate) for parameters with rates of their own, by the end of their name: `(("scale", 1e-4),)`.
        target: y. "inputs": what the original block makes of the same inputs x^, which quantised blocks put out (AQLM).
            "dense": what the original model has there, so that the block also mends the errors of those before it.
            "both": the sum of both errors (OmniQuant).
        also: other parameters of the block that are learnt, by the ends of their names as in `keep`.
        weight_decay: of AdamW, each step times the rate.
        seed: of the order of the batches.
    """

    steps: int = 100
    rate: float = 2e-3
    rates: tuple[tuple[str, float], ...] = ()
    target: Literal["inputs", "dense", "both"] = "dense"
    also: tuple[str, ...] = ("*norm", "bias")
    weight_decay: float = 0.0
    seed: int = 0
    # what stands in for the block's layers while they learn
    kind: ClassVar[type[TrainableLinear]] = TrainableLinear

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if self.target not in ("inputs", "dense", "both"):
            raise ValueError(f'target must be "inputs", "dense" or "both", got {self.target!r}')

    def tune_block(
        self,
        block: nn.Module,
        original: nn.Module,
        inputs: Sequence[BlockInputs],
        dense: Sequence[BlockInputs],
        index: int,
    ) -> None:
        sources = {"inputs": [inputs], "dense": [dense], "both": [inputs, dense]}[self.target]
        targets = [[each.run(index, original) for each in same] for same in zip(*sources)]

        def loss(batch: int) -> Tensor:
            output = inputs[batch].run(index, block)
            mask = inputs[batch].mask
            errors = (self.distance(token_rows(output, mask), token_rows(y, mask)) for y in targets[batch])
            return sum(errors, output.new_zeros(()))

        def error() -> float:
            losses = torch.stack([loss(batch) for batch in range(len(inputs))])
            return float(mean_over_processes(losses.mean()))

        with undone_unless_better(block, error), trainable(block, self.kind) as layers:
            optimizer = RelativeAdamW(
                learnable(block, self.also), self.rate, self.steps, self.rates, weight_decay=self.weight_decay
            )
            if not optimizer.parameters:
                return
            # AdamW does not care for a factor; but gradients of an error over all outputs are lost in float16
            outputs = most_over_processes(inputs[0].hidden.numel(), inputs[0].hidden.device)
            for step, batch in enumerate(shuffled(len(inputs), self.steps, self.seed)):
                (outputs * (loss(batch) + self.penalty(layers, step / self.steps))).backward()
                optimizer.step()

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """What is lost of `target`, (tokens, features)."""
        output, target = output.float(), target.float()
        return (output - target).square().sum() / target.square().sum()

    def penalty(self, layers: Mapping[str, TrainableLinear], progress: float) -> Tensor | float:
        """What is added to the loss while the layers learn, a share `progress` of the steps being taken."""
        return 0.0
