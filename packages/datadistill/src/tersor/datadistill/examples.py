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
            shapes = {getattr(item[0], "shape", None) for item in items if isinstance(item, tuple) and len(item) == 2}
            if not all(isinstance(item, tuple) and len(item) == 2 for item in items) or None in shapes:
                raise TypeError("items must be pairs (tensor, class number); wrap the data set with a transform")
            if len(shapes) > 1:
                raise ValueError(f"images have {len(shapes)} different shapes; resize them to one")
            images, labels = torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])
        if labels.ndim != 1 or labels.is_floating_point():
            raise TypeError(f"labels must be class numbers (examples,), got {tuple(labels.shape)} {labels.dtype}")
        return cls(images, labels.long())

    @property
    def classes(self) -> list[int]:
        return self.labels.unique().tolist()

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes
