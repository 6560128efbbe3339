"""Grey images with labels, from arrays."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.integration.zoo.data import splits
from tersor.integration.zoo.data.cache import cached, library

if TYPE_CHECKING:
    from datasets import Dataset


def labelled(
    name: str,
    split: str,
    classes: list[str],
    shares: Mapping[str, int],
    arrays: Callable[[], tuple[np.ndarray, list[int]]],
) -> "Dataset":
    """Rows of `image` and `label`: the `split` that `shares` makes of `arrays()`.

    Args:
        arrays: images, uint8 (count, height, width), and the label of each.
    """
    splits.check(split)
    datasets = library()

    def rows() -> Iterator[dict[str, Any]]:
        images, labels = arrays()
        for index in splits.indices(split, labels, shares):
            yield {"image": images[index], "label": labels[index]}

    features = datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=classes)})
    return cached(f"{name}-{split}", features, rows)
