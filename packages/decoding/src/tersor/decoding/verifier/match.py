"""Exact verifiers: the target chooses as it would without a draft."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Greedy:
    """argmax p. Ties fall as in `generate`, which takes the same argmax."""

    do_sample: ClassVar[bool] = False

    def verify(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        return scores.argmax(-1)


@dataclass(frozen=True)
class SampleMatch:
    """One draw y ~ p per emitted position: the law is p whatever was drafted, and x is kept with probability p(x).

    For a draft without randomness of its own this is speculative sampling (arXiv:2211.17192) with a point mass as q:
    accept x with probability p(x), else draw from p without x. But it spends one draw per emitted token, in order, as
    plain sampling does, so the same generator gives the same tokens with and without drafts.
    """

    do_sample: ClassVar[bool] = True

    def verify(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)
