"""The zeroth-order predictor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Reuse:
    """F_hat(t) = F(t_0): the newest computed feature as it is. Exact for features that are constant in time."""

    history: ClassVar[int] = 1

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """Weights of the features at `times` (newest first) that predict the feature at `t`."""
        return [1.0]
