"""What a smaller data set is made of: what is matched, what is stored, how it is judged; or how epochs are thinned."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tersor.datadistill.evaluation import Evaluator
from tersor.datadistill.examples import Examples


class Objective(Protocol):
    def choose(self, images: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Positions (k,) in `images` (examples of one class, ...), best first: a shorter choice is its beginning."""
        ...


class Parametrisation(Protocol):
    """What is stored is a NamedTuple of tensors of the parametrisation's own; its bytes are what the small set costs."""

    @property
    def per_class(self) -> int:
        """Examples of each class after decoding."""
        ...

    def store(self, examples: Examples, indices: Tensor) -> tuple[Tensor, ...]:
        """Keep `indices` of `examples`."""
        ...

    def decode(self, stored: Any) -> Examples:
        """What a network is trained on, of what `store` gave."""
        ...


class Kept(NamedTuple):
    """One epoch's choice: `keep` (examples,) bool, and the `weight` (examples,) of each one's loss."""

    keep: Tensor
    weight: Tensor


class Sampling(Protocol):
    def select(self, scores: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Kept:
        """What to train on in `epoch` of `epochs` (from 0); `scores` (examples,) are NaN where no loss is known yet."""
        ...

    def update(self, scores: Tensor, losses: Tensor) -> Tensor:
        """New scores of some examples after their `losses`; NaN scores are those of a first time."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A smaller data set.

    Args:
        objective: for `distill`: what the small set must match.
        parametrisation: for `distill`: what is stored of it.
        evaluation: how `DistilledSet.evaluate` judges it.
        sampling: for `sample`: which examples an epoch leaves out.
    """

    objective: Objective | None = None
    parametrisation: Parametrisation | None = None
    evaluation: Evaluator = Evaluator()
    sampling: Sampling | None = None
