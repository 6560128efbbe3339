"""What of a model will be quantised, and how; and all that could go wrong, before anything is changed."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor.quant.blocks import find_blocks, linears, matches
from tersor.quant.calibration import batches, num_tokens, own_part
from tersor.quant.grid import Grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.processes import over_processes
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme


def planned(
    model: Any, recipe: Recipe, keep: Sequence[str], allocation: Mapping[str, Grid]
) -> tuple[nn.ModuleList, list[dict[str, nn.Linear]], dict[str, Scheme]]:
    """The blocks, the linears of each that will be quantised, and how; raises what is wrong with any of it.

    Weights on the meta device are not looked into.
    """
    name, blocks = _stack(model, keep)
    whole = [linears(block, f"{name}.{index}") for index, block in enumerate(blocks)]
    _check_transform(recipe, [linear for layers in whole for linear in layers])
    found = [_kept_apart(layers, keep) for layers in whole]
    schemes = schemes_of(recipe, allocation, {name: linear for layers in found for name, linear in layers.items()})
    _check(model, name, blocks, found, schemes, keep)
    return blocks, found, schemes


def schemes_of(recipe: Recipe, allocation: Mapping[str, Grid], layers: Mapping[str, nn.Linear]) -> dict[str, Scheme]:
    if unknown := [name for name in allocation if name not in layers]:
        raise ValueError(f"allocation names {unknown[0]!r}, which is no linear to be quantised")
    scheme, schemes = recipe.scheme, {}
    for name, linear in layers.items():
        transform = scheme.transform
        if transform and transform.layers and not matches(name, transform.layers):
            transform = None
        one = replace(scheme, grid=allocation.get(name, recipe.grid), transform=transform)
        schemes[name] = one.padded(linear.out_features, linear.in_features) if recipe.pad else one
    return schemes


def calibration_batches(calibration: Any, found: list[dict[str, nn.Linear]]) -> list[dict[str, Tensor]]:
    if calibration is None:
        raise ValueError("this recipe learns from data: give calibration=token ids (sequences, seq_len)")
    data = batches(calibration)
    tokens = sum(map(num_tokens, data))
    widest = max(linear.in_features for layers in found for linear in layers.values())
    if tokens < 4 * widest:
        warnings.warn(
            f"{tokens} calibration tokens are few for layers with {widest} inputs; use at least {4 * widest}",
            stacklevel=4,
        )
    return own_part(data)


@contextmanager
def all_called(found: list[dict[str, nn.Linear]]) -> Iterator[Mapping[nn.Linear, str]]:
    """Raises ValueError, after what runs inside, if it gave no token to one of the linears: to an expert, say.

    Inside, those that are still to be called, and their names.
    """
    names = {linear: name for layers in found for name, linear in layers.items()}
    waiting = dict(names)

    def note(linear: nn.Linear, arguments: tuple[Any, ...]) -> None:
        if arguments[0].numel():
            waiting.pop(linear, None)

    handles = [linear.register_forward_pre_hook(note) for linear in waiting]
    try:
        yield waiting
    finally:
        for handle in handles:
            handle.remove()
    if names:
        # of several processes, another one may have met it
        called = torch.tensor([linear not in waiting for linear in names], device=next(iter(names)).weight.device)
        called = over_processes(called.int(), "MAX").tolist()
        for name in (name for name, met in zip(names.values(), called) if not met):
            raise ValueError(no_token(name))


def no_token(name: str) -> str:
    return f"{name} saw no token of the calibration data; give more of it, or skip the layer with keep=[{name!r}]"


def check_model(model: Any, keep: Sequence[str]) -> None:
    """Raises TypeError or ValueError if `model` cannot be quantised, whatever the recipe."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()) or getattr(model, "hf_quantizer", None):
        raise ValueError("the model is quantised already; start from the original")
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of names, got the string {keep!r}; use keep=[{keep!r}]")


def _stack(model: Any, keep: Sequence[str]) -> tuple[str, nn.ModuleList]:
    check_model(model, keep)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    for pattern in keep:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"keep names {pattern!r}, which is no part of {type(model).__name__}")
    return find_blocks(model)


def _check_transform(recipe: Recipe, names: Sequence[str]) -> None:
    transform = recipe.scheme.transform
    for pattern in transform.layers if transform else ():
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"{transform} is for linears that are called {pattern!r}, but there are only {names[0]} and the like: name "
                f"others in layers"
            )


def _kept_apart(found: dict[str, nn.Linear], keep: Sequence[str]) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in found.items() if not matches(name, keep)}


def _check(
    model: nn.Module,
    name: str,
    blocks: nn.ModuleList,
    found: list[dict[str, nn.Linear]],
    schemes: Mapping[str, Scheme],
    keep: Sequence[str],
) -> None:
    """Everything that could go wrong with the weights, before any of them is changed."""
    derived = [n for n, m in blocks.named_modules(prefix=name) if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    if unsaid := [other for other in derived if not matches(other, keep)]:
        warnings.warn(
            f"{len(unsaid)} linears of classes of their own stay as they are: {unsaid[0]} and the like; "
            f"say so with keep=[{unsaid[0].split('.')[-1]!r}]",
            stacklevel=5,
        )
    if not any(found):
        raise ValueError(f"no linear of {name} is left to quantise: keep={list(keep)} names all of them")
    for block_name, parameter in blocks.named_parameters(prefix=name):
        if parameter.ndim == 3 and not matches(block_name, keep):
            raise NotImplementedError(
                f"{block_name} holds experts in one parameter {tuple(parameter.shape)}, which is not supported yet; leave "
                f"them as they are with keep=[{block_name!r}]"
            )
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    for layers in found:
        for full_name, linear in layers.items():
            way_out = f"skip the layer with keep=[{full_name!r}]"
            scheme, shape = schemes[full_name], (linear.out_features, linear.in_features)
            try:
                scheme.check(*shape)
            except ValueError as error:
                zeros = scheme.padded(*shape).padding
                offer = f"or add {zeros} columns of zeros with pad=True in the recipe; " if zeros else ""
                raise ValueError(f"{full_name}: {error}; {offer}or {way_out}") from error
            if not linear.weight.is_meta and not linear.weight.isfinite().all():
                raise ValueError(f"{full_name}: the weight holds NaN or infinity; mend the checkpoint, or {way_out}")
            if len(tied := owners[id(linear.weight)]) > 1:
                raise NotImplementedError(
                    f"{' and '.join(tied)} are one parameter, which is not supported yet; {way_out}"
                )
