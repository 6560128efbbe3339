"""The features of one site in one context."""

from typing import Any

from torch import Tensor

from tersor.diffcache.recipe import Predictor
from tersor.kernels import weighted_sum


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
        """sum_j w_j F(t_j) for each tensor of the feature; the newest feature itself if its weight 1 is the only one."""
        weights = predictor.weights(self._times, time)
        if list(weights) == [1.0]:
            return list(self._features[0])  # the newest itself, not a copy
        present = [[tensor for tensor in tensors if tensor is not None] for tensors in zip(*self._features)]
        return [weighted_sum(weights, tensors) if tensors else None for tensors in present]
