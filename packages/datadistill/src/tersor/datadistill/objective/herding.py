"""The mean is matched, one example at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Herding:
    """Next is argmin_i | m - (z_i + sum_chosen z) / (t + 1) |: greedy mean matching without replacement.

    Source: arXiv:1611.07725, algorithm 4. For features of length 1 this is Welling's rule, argmax <(t + 1) m - sum z, z_i>;
    for others that rule would prefer long features, whatever the mean. Ties go to the earlier example; computed in
    float64, so that the choice does not depend on the device. The generator is not used.

    Args:
        normalise: features are the flattened images divided by their length, else the images themselves.
    """

    normalise: bool = False

    def choose(self, images: Tensor, k: int, generator: torch.Generator) -> Tensor:
        z = images.flatten(1).double()
        if self.normalise:
            z = normalize(z, dim=1)
        mean, norm = z.mean(0), z.square().sum(1)
        chosen, total = [], torch.zeros_like(mean)
        left = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for t in range(k):
            # |(t + 1) m - total - z_i|^2 without what is the same for all i
            distance = norm - 2 * (z @ ((t + 1) * mean - total))
            best = int(distance.where(left, torch.inf).argmin())
            chosen.append(best)
            left[best] = False
            total += z[best]
        return torch.tensor(chosen)
