"""How much a model's predictions change when some of a layer's weights are masked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.divergence import swapped, text
from tersor.quant.allocation.error import RelativeError
from tersor.quant.allocation.protocol import Table
from tersor.quant.teacher import Teacher


@dataclass(frozen=True)
class MaskSensitivity:
    """O_l t_lo^2 (OHQ, arXiv:2309.01945): O_l the KL divergence of the model with a random mask on the layer's weights.

    The mean over a few masks, whatever grids there are: a pass of the text for each layer and mask. t^2 is the relative
    squared error of the weight on grid o, which the paper takes from a formula.

    Args:
        ratio: of the weights, kept. Half, as in the paper, is an error of another order than that of rounding: on
            tiny-cnn such masks rank layers worse (.4 to .6 in rank correlation with rounding to 3 bits, .9: .7 to .8).
        repeats: masks of a layer.
        tokens: of the calibration data that are looked at.
        top_k: see `Teacher`.
        seed: of the masks, and of random tokens where there is no calibration data.
    """

    ratio: float = 0.9
    repeats: int = 5
    tokens: int = 2048
    top_k: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be between 0 and 1, got {self.ratio}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be positive, got {self.repeats}")

    def losses(self, candidates: Candidates) -> Table:
        teacher = Teacher(candidates.model, text(candidates, self.tokens, self.seed), self.top_k)
        sensitivities = self.sensitivities(candidates.weights, teacher.divergence)
        errors = RelativeError().losses(candidates)
        return {name: [of_layer * error for error in errors[name]] for name, of_layer in sensitivities.items()}

    def sensitivities(self, weights: Mapping[str, Tensor], divergence: Callable[[], float]) -> dict[str, float]:
        """O of each layer.

        Args:
            weights: parameters of a model, by the name of their layer.
            divergence: of the model's predictions from those before any weight was changed.
        """
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, weight in weights.items():
            total = 0.0
            for _ in range(self.repeats):
                kept = torch.rand(weight.shape, generator=generator) < self.ratio
                with swapped({weight: weight * kept.to(weight.device)}):
                    total += divergence()
            found[name] = total / self.repeats
        return found
