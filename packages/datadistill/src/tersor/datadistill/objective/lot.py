"""Nothing is matched: the baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomChoice:
    """Examples without replacement, all equally likely."""

    def choose(self, images: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(images), generator=generator)[:k]
