"""A data set as two tensors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset


class Examples(NamedTuple):
    """All of a labelled data set.

    Args:
        images: (examples, ...), in the dtype that the data set has.
        labels: (examples,), int64.
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, dataset: Dataset) -> "Examples":
        """Every item of `dataset`: pairs of a tensor and a class number, all tensors of one shape."""
        if not len(dataset):  # type: ignore[arg-type]  # map-style data sets have a length
            raise ValueError("the data set is empty")
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            images, labels = dataset.tensors
        else:
            items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
            if not all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Tensor) for item in items):
                raise TypeError("items must be pairs (tensor, class number); wrap the data set with a transform")
            shapes = {item[0].shape for item in items}
            if len(shapes) > 1:
                raise ValueError(f"images have {len(shapes)} different shapes; resize them to one")
            images = torch.stack([item[0] for item in items])
            labels = torch.tensor([float(item[1]) for item in items], dtype=torch.float64)
        if labels.ndim != 1:
            raise TypeError(f"labels must be class numbers (examples,), got shape {tuple(labels.shape)}")
        broken = (labels % 1 != 0).nonzero()[:, 0].tolist()  # infinity and NaN too
        if broken:
            raise ValueError(f"labels must be whole numbers, got {labels[broken[0]].item()} at index {broken[0]}")
        return cls(images, labels.long())

    @property
    def classes(self) -> list[int]:
        return self.labels.unique().tolist()

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes
