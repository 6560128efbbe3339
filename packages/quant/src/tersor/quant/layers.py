"""Quantising the layers of one block: those that share an input are solved as one."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.activation import CalibratedActivation
from tersor.quant.calibration import (
    BlockInputs,
    Pass,
    SecondMoments,
    SharedInput,
    block_passes,
    second_moments,
    shared_inputs,
)
from tersor.quant.grid import Grid, IntGrid
from tersor.quant.grid.narrowed import NarrowedIntGrid
from tersor.quant.linear import QuantizedLinear, decoded
from tersor.quant.processes import of_first_process
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme
from tersor.quant.solver import relative_error
from tersor.quant.survey import no_token


def layers_by_input(
    block: nn.Module, found: dict[str, nn.Linear], running: list[BlockInputs], index: int
) -> Iterator[tuple[dict[str, nn.Linear], SecondMoments | None]]:
    """The linears of `block` that share an input, and its moments now that those before them are replaced."""
    runs = block_passes(block, running, index)
    if runs:
        # those of one process: an expert that is called there may not be called in another's first batch
        device = next(block.parameters()).device
        groups = of_first_process(shared_inputs(found, runs[0][0]), device) if found else []
    else:
        groups = [SharedInput([name], 0) for name in found]
    for names, calls in groups:
        with decoded(block):
            moments = _moments(names[0], found[names[0]], calls, runs) if runs else None
        yield {name: found[name] for name in names}, moments


def advance(block: nn.Module, running: list[BlockInputs], index: int) -> None:
    """From the inputs of block `index` to those of the next one."""
    with decoded(block):
        for inputs in running:
            inputs.hidden = inputs.run(index, block)


def _moments(name: str, linear: nn.Linear, calls: int, runs: list[Pass]) -> SecondMoments:
    moments = second_moments(linear, calls, runs)
    moments.merge()
    if not moments.count:
        raise ValueError(no_token(name))
    if moments.count < linear.in_features:
        warnings.warn(
            f"{name} saw only {moments.count} tokens, fewer than its {linear.in_features} inputs; give more calibration data",
            stacklevel=2,
        )
    if not moments.sum.isfinite().all():
        raise ValueError(f"{name}: its inputs on the calibration data hold NaN or infinity")
    return moments


def solve(
    layers: dict[str, nn.Linear],
    recipe: Recipe,
    schemes: dict[str, Scheme],
    moments: SecondMoments | None,
    ranges: Mapping[nn.Linear, Tensor] | None = None,
) -> Iterator[tuple[str, QuantizedLinear]]:
    """Quantised layers for linears with the same inputs; `ranges` are those of `RangeTransform`s."""
    together: dict[Any, list[str]] = {}
    for name in layers:
        scheme = schemes[name]
        together.setdefault(scheme if scheme.grid.per_row else name, []).append(name)
    for names in together.values():
        group = {name: layers[name] for name in names}
        yield from _solve_as_one(group, recipe, schemes[names[0]], moments, ranges or {})


def _solve_as_one(
    layers: dict[str, nn.Linear],
    recipe: Recipe,
    scheme: Scheme,
    moments: SecondMoments | None,
    ranges: Mapping[nn.Linear, Tensor],
) -> Iterator[tuple[str, QuantizedLinear]]:
    """The same for linears with one scheme: solved as one tall weight, as solvers treat rows one by one."""
    grid, transform, hessian = scheme.grid, scheme.transform, moments.mean if moments else None
    padding = scheme.padding
    weight = F.pad(torch.cat([linear.weight for linear in layers.values()]).float(), (0, padding))
    if hessian is not None and padding:
        hessian = F.pad(hessian, (0, padding, 0, padding))
    try:
        turned: dict[str, Tensor] = {}
        if transform:
            turned = transform.fit(weight, hessian, grid)
            weight = transform.of_weight(weight, turned)
            if hessian is not None:
                # T^T H T: rows, then columns
                hessian = transform.apply(transform.apply(hessian, turned).T, turned)
        codes, params, *left = recipe.solver.solve(weight, _spanning(grid, layers, ranges), hessian)
    except ValueError as error:
        raise ValueError(f"{', '.join(layers)}: {error}") from error
    sizes = [linear.out_features for linear in layers.values()]
    weights = weight.split(sizes)
    if moments and isinstance(scheme.activation, CalibratedActivation):
        scheme = replace(scheme, activation=scheme.activation.fit(moments.maxima, padding))
    targets = left[0].split(sizes) if left else [None] * len(sizes)
    # what is not of rows is of one layer only
    parts = zip(*(tensor.split(sizes) for tensor in (codes, *params))) if len(sizes) > 1 else [(codes, *params)]
    for (name, linear), original, target, (own_codes, *own) in zip(layers.items(), weights, targets, parts):
        own_params = type(params)(*own)
        decoded, added = grid.decode(own_codes, own_params), None
        form = scheme
        if scheme.compensation:
            fitted, added = scheme.compensation.fit(original - decoded if target is None else target, hessian)
            decoded = decoded + fitted.decode(added, (linear.out_features, linear.in_features + padding))
            form = replace(scheme, compensation=fitted)
        # checkpoints have no place for tensors that are shared
        own_turned = {key: tensor.clone() for key, tensor in turned.items()}
        layer = QuantizedLinear.from_linear(linear, form, grid.pack(own_codes, own_params), own_turned, added)
        layer.relative_error = relative_error(original, decoded, hessian)
        if recipe.tuning:
            layer.original = original if target is None else original - target
        yield name, layer


def _spanning(grid: Grid, layers: Mapping[str, nn.Linear], ranges: Mapping[nn.Linear, Tensor]) -> Grid:
    """`grid` as the solver is to see it: fitted to the ranges that were learnt for these layers, if any were."""
    if not isinstance(grid, IntGrid) or not any(linear in ranges for linear in layers.values()):
        return grid
    shares = [ranges.get(linear, torch.ones_like(linear.weight[:, :1])).float() for linear in layers.values()]
    return NarrowedIntGrid(**asdict(grid), share=torch.cat(shares))
