"""Real examples, as they are."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tersor.datadistill.examples import Examples


class StoredSubset(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor  # in the data set that was distilled


@dataclass(frozen=True)
class Subset:
    """Images, labels and where they came from.

    Args:
        per_class: examples of each class.
    """

    per_class: int = 10

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {self.per_class}")

    def store(self, examples: Examples, indices: Tensor) -> StoredSubset:
        return StoredSubset(examples.images[indices], examples.labels[indices], indices)

    def decode(self, stored: StoredSubset) -> Examples:
        return Examples(stored.images, stored.labels)
