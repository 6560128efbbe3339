"""Computes the points of `GaussianPairGrid`: `python -m tersor.quant.grid.gaussian_tables` writes them anew in minutes.

k-means on samples of N(0, 1)^2: of several random starts on few samples the best one is refined on many.
"""

import torch
from safetensors.torch import save_file
from torch import Tensor

from tersor.quant.grid.gaussian import TABLES

SIZES = (16, 32, 64, 128, 256)
_BLOCK = 2**14


def normal_points(n: int, starts: int = 16, few: int = 2**15, many: int = 2**21, seed: int = 0) -> Tensor:
    """(n, 2) points of least squared error for N(0, 1)^2, by their distance from zero."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(few, 2, generator=generator)
    found = [lloyd(samples, samples[torch.randperm(few, generator=generator)[:n]], 100) for _ in range(starts)]
    best = min(found, key=lambda points: error(samples, points))
    points = lloyd(torch.randn(many, 2, generator=generator), best, 50)
    return points[points.square().sum(-1).argsort()]


def error(samples: Tensor, points: Tensor) -> float:
    """Mean squared error of a coordinate of `samples` (m, 2), each replaced by the nearest of `points`."""
    return float((samples - points[_nearest(samples, points)]).square().mean())


def lloyd(samples: Tensor, points: Tensor, steps: int) -> Tensor:
    """`points` moved to the means of the samples nearest to them, again and again."""
    for _ in range(steps):
        nearest = _nearest(samples, points)
        counts = torch.bincount(nearest, minlength=len(points))
        sums = torch.zeros(points.shape, dtype=torch.float64).index_add_(0, nearest, samples.double())
        points = (sums / counts[:, None]).float().where(counts[:, None] > 0, points)
    return points


def _nearest(samples: Tensor, points: Tensor) -> Tensor:
    half_norms = points.square().sum(-1) / 2
    return torch.cat([(block @ points.T - half_norms).argmax(-1) for block in samples.split(_BLOCK)])


if __name__ == "__main__":
    save_file({str(n): normal_points(n) for n in SIZES}, TABLES)
