"""A small data set that stands for a large one."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.datadistill.evaluation import Accuracy
from tersor.datadistill.examples import Examples
from tersor.datadistill.recipe import Recipe


def distill(dataset: Dataset, recipe: Recipe, *, generator: torch.Generator | None = None) -> "DistilledSet":
    """The small data set that `recipe` makes of `dataset`, class by class.

    Args:
        dataset: pairs (image tensor, class number) of one shape; read whole into memory.
        recipe: what `recipes` offers, or pieces of your own.
        generator: source of all draws, on the CPU; None is seed 0, so that the same call gives the same set.

    Raises:
        ValueError: a class has fewer examples than asked for.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from tersor.datadistill import distill, recipes
    >>> generator = torch.Generator().manual_seed(0)
    >>> images = torch.randn(60, 1, 8, 8, generator=generator)
    >>> labels = torch.arange(60) % 3
    >>> small = distill(TensorDataset(images, labels), recipes.herding(per_class=2))
    >>> len(small), small.labels.tolist()
    (6, [0, 0, 1, 1, 2, 2])
    >>> small.nbytes, small.source_nbytes  # 6 of 60 images and labels, and 6 indices
    (1632, 15840)
    """
    if recipe.objective is None or recipe.parametrisation is None:
        raise ValueError(f"{recipe} has no objective or no parametrisation; a recipe for sampling goes to `sample`")
    generator = generator or torch.Generator().manual_seed(0)
    examples = Examples.of(dataset)
    k = recipe.parametrisation.per_class
    chosen = []
    for c in examples.classes:
        members = (examples.labels == c).nonzero()[:, 0]
        if len(members) < k:
            raise ValueError(f"class {c} has {len(members)} examples, per_class = {k}; use per_class <= {len(members)}")
        picks = recipe.objective.choose(examples.images[members], k, generator)
        chosen.append(members[picks.to(members.device)])
    stored = recipe.parametrisation.store(examples, torch.cat(chosen))
    return DistilledSet(recipe, stored, examples.nbytes)


class DistilledSet(Dataset):
    """What `distill` returns: a torch data set of pairs (image, class number), ordered by class, best first.

    Attributes:
        stored: the tensors that are kept; for a subset `.images`, `.labels`, `.indices`.
        source_nbytes: images and labels of the data set that was distilled.
    """

    def __init__(self, recipe: Recipe, stored: Any, source_nbytes: int) -> None:
        assert recipe.parametrisation is not None  # distill has asked
        self.recipe = recipe
        self.stored = stored
        self.source_nbytes = source_nbytes
        self._decoded: Examples = recipe.parametrisation.decode(stored)

    @property
    def images(self) -> Tensor:
        return self._decoded.images

    @property
    def labels(self) -> Tensor:
        return self._decoded.labels

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: images, labels and what else the parametrisation needs."""
        return sum(tensor.nbytes for tensor in self.stored)

    def __len__(self) -> int:
        return len(self._decoded.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self._decoded.images[i], self._decoded.labels[i]

    def evaluate(self, test: Dataset) -> Accuracy:
        """Accuracy on `test` of fresh networks trained on this set, by the recipe's evaluator."""
        return self.recipe.evaluation.evaluate(self._decoded, Examples.of(test))
