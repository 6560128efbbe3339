"""What quantising would cost: sizes counted from the grid's buffers, and a guess of the time, without doing it."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersor.quant.experts import has_fused_experts, separate_experts
from tersor.quant.grid import Grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme
from tersor.quant.survey import planned

# solvers take time in proportion to the rows, and some before the first of them: two counts tell both
_FEW, _MORE = 32, 128
_TOKENS = 256
# a block is run once for each group of layers that share inputs (about half of it), and for its outputs
_RUNS = 3


@dataclass(frozen=True)
class Estimate:
    """What `quantize` would leave behind, and when.

    Args:
        original_nbytes: of the linears that would be quantised, as they are.
        nbytes: of what would stand in their place, by buffer: "codes", "scale_bits", ...
        other_nbytes: of all that stays: embeddings, norms, what `keep` names.
        bits_per_weight: of the quantised linears, everything counted.
        seconds: to quantise on this machine, within a factor of two or so; None for recipes that transform, tune or allocate.
    """

    original_nbytes: int
    nbytes: Mapping[str, int]
    other_nbytes: int
    bits_per_weight: float
    seconds: float | None


def estimate(
    model: Any,
    recipe: Recipe,
    num_tokens: int = 0,
    *,
    keep: Sequence[str] = (),
    allocation: Mapping[str, Grid] | None = None,
) -> Estimate:
    """Sizes and time of `quantize(model, recipe, ...)`; `model` may be on the meta device.

    Args:
        num_tokens: of calibration data; 0 for recipes that need none.

    Raises:
        UnsupportedModel, ValueError: as `quantize` would.
    """
    if has_fused_experts(model):
        model = copy.deepcopy(model)
        separate_experts(model, keep)
    _, of_blocks, schemes = planned(model, recipe, keep, allocation or {})
    found = {name: linear for layers in of_blocks for name, linear in layers.items()}
    nbytes: Counter[str] = Counter()
    for n, linear in found.items():
        layer = QuantizedLinear(linear.in_features, linear.out_features, False, schemes[n], "meta")
        nbytes.update({buffer: tensor.nbytes for buffer, tensor in layer.named_buffers()})
    weights = sum(linear.weight.numel() for linear in found.values())
    original = sum(linear.weight.nbytes for linear in found.values())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return Estimate(
        original,
        dict(nbytes),
        whole - original,
        8 * nbytes.total() / weights,
        _seconds(found, schemes, recipe, num_tokens),
    )


def _seconds(
    found: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], recipe: Recipe, num_tokens: int
) -> float | None:
    if recipe.transforms or recipe.tuning or recipe.allocation:
        return None
    kinds = Counter(
        (linear.out_features, linear.in_features + schemes[n].padding, schemes[n].grid) for n, linear in found.items()
    )
    return sum(count * _one_layer(*kind, recipe, num_tokens) for kind, count in kinds.items())


def _one_layer(out_features: int, in_features: int, grid: Grid, recipe: Recipe, num_tokens: int) -> float:
    """Seconds for a layer of this shape, from random weights with few rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, in_features, generator=generator)
    hessian = torch.eye(in_features) + x.T @ x / _TOKENS if recipe.needs_hessian else None

    def solve(rows: int) -> Callable[[], Any]:
        weight = torch.randn(min(rows, out_features), in_features, generator=generator)
        return lambda: recipe.solver.solve(weight, grid, hessian)

    solve(1)()  # what is compiled and cached is not counted for every layer
    few, more = _time(solve(_FEW)), _time(solve(_MORE))
    seconds = few + max(0.0, more - few) / (_MORE - _FEW) * max(0, out_features - _FEW)
    if recipe.needs_data:
        weight = torch.randn(out_features, in_features)
        run, moments = _time(lambda: x @ weight.T), _time(lambda: x.T @ x)
        seconds += num_tokens / _TOKENS * (_RUNS * run + moments)
    return seconds


def _time(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
