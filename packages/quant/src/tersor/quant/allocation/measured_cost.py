"""Costs measured on the machine at hand."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.protocol import Table
from tersor.quant.linear import QuantizedLinear
from tersor.quant.processes import mean_over_processes
from tersor.quant.scheme import Scheme


@dataclass(frozen=True)
class MeasuredCost:
    """Microseconds of a layer's product, run on random weights and inputs (OHQ, arXiv:2309.01945).

    One layer of every shape and grid; the median of some rounds in which all of them run in turn, as in a model, where
    each finds the cache as others left it. Budgets are microseconds of all layers together. Measure with as many
    threads as will run later.

    Args:
        tokens: of the input: 1, as in decoding.
        repeats: timed rounds; a tenth as many run before them.
    """

    tokens: int = 1
    repeats: int = 50
    unit = "µs"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.repeats < 1:
            raise ValueError(f"tokens and repeats must be positive, got {self.tokens} and {self.repeats}")

    def costs(self, candidates: Candidates) -> Table:
        linears, grids = candidates.linears, candidates.grids
        shapes = {linear.weight.shape: linear for linear in linears.values()}
        calls = {
            (shape, grid): self._call(
                linear, Scheme(grid, activation=candidates.recipe.activation, padding=candidates.padding(linear, grid))
            )
            for shape, linear in shapes.items()
            for grid in grids
        }
        warm_up = max(self.repeats // 10, 1)
        rounds = [
            {kind: _seconds(call, candidates.model.device) for kind, call in calls.items()}
            for _ in range(warm_up + self.repeats)
        ]
        found = [1e6 * statistics.median(seconds[kind] for seconds in rounds[warm_up:]) for kind in calls]
        # processes that measured for themselves would not agree on what is affordable
        mean = mean_over_processes(torch.tensor(found, dtype=torch.float64, device=candidates.model.device))
        medians = dict(zip(calls, mean.tolist()))
        return {name: [medians[linear.weight.shape, grid] for grid in grids] for name, linear in linears.items()}

    def scale(self, candidates: Candidates) -> float:
        return 1

    def _call(self, linear: nn.Linear, scheme: Scheme) -> Callable[[], Any]:
        """The product of a layer like `linear`."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(linear.out_features, linear.in_features + scheme.padding, generator=generator)
        params = scheme.grid.fit(weight)
        stored = scheme.grid.pack(scheme.grid.encode(weight, params), params)
        layer = QuantizedLinear.from_linear(linear, scheme, stored).to(linear.weight.device)
        x = torch.randn(self.tokens, linear.in_features, generator=generator).to(linear.weight)
        return lambda: layer(x)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
