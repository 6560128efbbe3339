"""Codebooks of least squared error: Lloyd's algorithm, for weights, for pairs, and for the normal distribution."""

import math
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor


@cache
def normal_levels(n: int) -> tuple[float, ...]:
    """The n levels of least squared error for N(0, 1), ascending (Max 1960).

    >>> [round(level, 4) for level in normal_levels(4)]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    # levels in the density that is best for many of them (Panter and Dite 1951), from which few steps are left
    start = NormalDist(sigma=math.sqrt(3))
    levels = torch.tensor([start.inv_cdf((i + 0.5) / n) for i in range(n)], dtype=torch.float64)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20 * n):
        cuts = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        density = torch.exp(-cuts.square() / 2) / math.sqrt(2 * math.pi)
        # both halves by the lower one's tail, which keeps its digits
        means = -density.diff() / torch.special.ndtr(cuts).diff()
        # as symmetric as they are but for rounding
        levels = (means - means.flip(0)) / 2
    return tuple(levels.tolist())


def kmeans(values: Tensor, n: int, importance: Tensor | None = None, max_steps: int = 100) -> Tensor:
    """(..., n) levels, ascending, that `values` (..., m) lie near to in the sum of squares, each row by itself.

    Lloyd's algorithm, on sorted rows and their cumulated sums, from two starts: the row's quantiles, and the levels best
    for a normal distribution.

    Args:
        importance: (..., m), not negative, what each square is multiplied by; None: 1.
        max_steps: per start; it stops before when no level moves.
    """
    shape, values = values.shape[:-1], values.reshape(-1, values.shape[-1]).double()
    values, order = values.sort(-1)
    mass = (
        torch.ones_like(values) if importance is None else importance.reshape(values.shape).double().gather(-1, order)
    )
    # rows that do not matter at all
    mass = mass.where(mass.sum(-1, keepdim=True) > 0, 1.0)
    rows = _Rows(values, mass)
    ranks = (torch.arange(n, device=values.device) + 0.5) / n * rows.mass[:, -1:]
    quantiles = torch.searchsorted(rows.mass[:, 1:].contiguous(), ranks).clamp(max=values.shape[-1] - 1)
    spread = torch.tensor(normal_levels(n), device=values.device)
    starts = values.gather(-1, quantiles), rows.mean + spread * rows.deviation
    best, other = (_lloyd(rows, start, max_steps) for start in starts)
    return best.where(rows.explained(best) >= rows.explained(other), other).view(*shape, n).float()


class _Rows:
    """Sorted values (rows, m), their masses, and sums over any run of them."""

    def __init__(self, values: Tensor, mass: Tensor) -> None:
        self.values = values.contiguous()
        self.mass = _cumulated(mass)
        self.moment = _cumulated(mass * values)
        self.mean = self.moment[:, -1:] / self.mass[:, -1:]
        self.deviation = ((mass * (values - self.mean).square()).sum(-1, keepdim=True) / self.mass[:, -1:]).sqrt()

    def nearest(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and first moment of what lies nearest to each of the levels (rows, n)."""
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        ends = torch.searchsorted(self.values, middles, right=True)
        ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], self.values.shape[1])], -1)
        return self.mass.gather(-1, ends).diff(), self.moment.gather(-1, ends).diff()

    def explained(self, levels: Tensor) -> Tensor:
        """(rows, 1): by how much the sum of squares falls from that of the values themselves."""
        mass, moment = self.nearest(levels)
        return (2 * moment * levels - mass * levels.square()).sum(-1, keepdim=True)


def _lloyd(rows: _Rows, levels: Tensor, max_steps: int) -> Tensor:
    for _ in range(max_steps):
        mass, moment = rows.nearest(levels)
        moved = (moment / mass).where(mass > 0, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _cumulated(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[:, :1]), values.cumsum(-1)], -1)
