"""Integer layers that round the weight that was quantised anew while they learn."""

import math

import torch
from torch import Tensor, nn

from tersor.quant.grid import IntGrid, IntParams
from tersor.quant.linear import QuantizedLinear
from tersor.quant.tuning.trainable import TrainableLinear


class RoundedLinear(TrainableLinear):
    """A layer on an `IntGrid` that still knows the weight W that its codes stand for."""

    grid: IntGrid
    scale: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        kind = type(self).__name__
        if not isinstance(self.grid, IntGrid):
            raise TypeError(f"{kind} needs evenly spaced levels, which {self.grid} does not have: use an IntGrid")
        if layer.original is None:
            raise ValueError(f"{kind} needs the weight that was quantised, which layers keep only within `quantize`")
        self.original = layer.original

    @property
    def lowest(self) -> int:
        """The lowest code that is used."""
        return int(self.grid.restricted)

    @property
    def highest(self) -> int:
        return 2**self.grid.bits - 1

    def grouped(self, tensor: Tensor) -> Tensor:
        """`tensor` (out, in) as (out, groups, group_size)."""
        return tensor.unflatten(-1, (self.scale.shape[1], -1))

    def levels(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """W, rounded to levels of this `scale` and `zero_point` (out, groups).

        Gradients are those of W / scale, clipped: as if rounding did nothing.
        """
        scale, zero_point = scale[..., None], zero_point[..., None].float()
        codes = round_through((self.grouped(self.original) / scale + zero_point).clamp(self.lowest, self.highest))
        return ((codes - zero_point) * scale).flatten(-2)

    @torch.no_grad()
    def store(self) -> QuantizedLinear:
        self.codes = self.grid.encode(self.original, self.rounded())
        return super().store()


class SteppedLinear(RoundedLinear):
    """Its steps are learnt (arXiv:1902.08153): d w^ / d s is round(w / s) - w / s, beyond the levels the outermost one."""

    @property
    def weight(self) -> Tensor:
        scale, zero_point = self.params
        numel, qmax = self.original.shape[1] // scale.shape[1], max(2 ** (self.grid.bits - 1) - 1, 1)
        return self.levels(scaled_gradient(scale, 1 / math.sqrt(numel * qmax)), zero_point)


class ClippedLinear(RoundedLinear):
    """The range of each group is learnt: sigmoid(lower) min(w) ... sigmoid(upper) max(w) (arXiv:2308.13137, section 3.2)."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        # they follow from the range
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.extremes = self.grid.extremes(self.original)
        # sigmoid(4) = .982
        self.lower, self.upper = (nn.Parameter(torch.full_like(extreme, 4.0)) for extreme in self.extremes)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """From, to, (out, groups)."""
        low, high = self.extremes
        return self.lower.sigmoid() * low, self.upper.sigmoid() * high

    @property
    def weight(self) -> Tensor:
        low, high = self.range
        span = 2 * torch.maximum(-low, high) if self.grid.symmetric else high - low
        # a group of zeros has no range, but is divided by its scale
        scale = (span / (self.highest - self.lowest)).clamp(min=torch.finfo(torch.float16).tiny)
        if self.grid.symmetric:
            return self.levels(scale, torch.full_like(scale, 2 ** (self.grid.bits - 1)))
        zero_point = -low / scale
        return self.levels(scale, zero_point if self.grid.float_zero else round_through(zero_point))

    @torch.no_grad()
    def rounded(self) -> IntParams:
        return self.grid.spanning(*self.range)


class SoftlyRoundedLinear(RoundedLinear):
    """Each weight lies between two neighbouring levels: (lower code + h(v) - zero_point) * scale (arXiv:2004.10568).

    h(v) = clip(1.2 sigmoid(v) - .1, 0, 1). One of the two is the code that the solver chose, the other the next one
    towards W; h starts half-way from that code to W, so that at first what is stored is what the solver found.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        scale, zero_point = self.params
        with torch.no_grad():
            steps = self.grouped(self.original) / scale[..., None] + zero_point[..., None]
            codes = self.grouped(self.codes.float())
            self.lower = (codes - (steps < codes).float()).clamp(self.lowest, self.highest - 1)
            # not quite to the ends: a solver may have gone further than to the next level, and a half would be either
            h = ((steps - self.lower).clamp(0.01, 0.99) + codes - self.lower) / 2
        self.v = nn.Parameter(torch.logit((h + 0.1) / 1.2))

    @property
    def h(self) -> Tensor:
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    @property
    def weight(self) -> Tensor:
        scale, zero_point = self.params
        return ((self.lower + self.h - zero_point[..., None]) * scale[..., None]).flatten(-2)

    @torch.no_grad()
    def store(self) -> QuantizedLinear:
        self.codes = (self.lower + (self.h >= 0.5)).to(torch.uint8).flatten(-2)
        return TrainableLinear.store(self)


def round_through(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x."""
    return x + (x.round() - x).detach()


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with `factor` times its gradient."""
    return x.detach() + factor * (x - x.detach())
