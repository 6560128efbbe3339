"""The features of one site in one context."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.diffcache.recipe import Predictor


class History:
    """A ring of the newest `predictor.history` computed features of a site, raw, newest first.

    Args:
        signature: shapes, dtypes and devices of the site's inputs; a call with others does not belong here.
        like: structure of the site's output.
        macs: multiply-accumulates of one evaluation.
    """

    def __init__(self, signature: tuple[Any, ...], like: Any, macs: int) -> None:
        self.signature = signature
        self.like = like
        self.macs = macs
        self._times: list[float] = []
        self._features: list[list[Tensor | None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind the features."""
        return sum(t.untyped_storage().nbytes() for feature in self._features for t in feature if t is not None)

    def push(self, time: float, feature: list[Tensor | None], keep: int) -> None:
        self._times = [time, *self._times][:keep]
        self._features = [feature, *self._features][:keep]

    def predict(self, predictor: Predictor, time: float) -> list[Tensor | None]:
        """sum_j w_j F(t_j) for each tensor of the feature."""
        weights = predictor.weights(self._times, time)
        return [weighted_sum(weights, tensors) for tensors in zip(*self._features)]


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor | None]) -> Tensor | None:
    """sum_j w_j F_j, summed in float32 at least, in the dtype of F_0; F_0 itself if its weight 1 is the only one."""
    newest = tensors[0]
    if newest is None or list(weights) == [1.0]:
        return newest
    total = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
    for w, tensor in zip(weights, tensors):
        if tensor is not None:
            total.add_(tensor, alpha=w)
    return total.to(newest.dtype)
