"""The walk: block by block, and in each one input by input, on what the layers quantised before put out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor.quant.blocks import find_blocks, linears, matches
from tersor.quant.calibration import (
    BlockInputs,
    Pass,
    SharedInput,
    batches,
    block_inputs,
    num_tokens,
    second_moments,
    shared_inputs,
)
from tersor.quant.checkpoint import mark
from tersor.quant.grid import IntParams
from tersor.quant.linear import QuantizedLinear
from tersor.quant.recipe import Recipe
from tersor.quant.solver import relative_error

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def quantize(
    model: Any,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Any:
    """`model`, its blocks' linears replaced in place by quantised ones; embeddings and the output head stay.

    Each layer is fitted to what it is given once all layers before it are quantised; layers that share an input are
    quantised together. Save with `save_pretrained`; `from_pretrained` loads the result wherever `tersor.quant` has been
    imported. Each new layer knows its `relative_error`: of its outputs on the calibration data, or of its weights if
    the recipe needs no data.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tersor.quant import quantize, recipes
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    >>> model = quantize(LlamaForCausalLM(config), recipes.rtn(bits=4, group_size=32))
    >>> model.model.layers[0].mlp.up_proj.nbytes  # 128 x 64 weights at 4 bits, 256 scales of 2 bytes, 256 zero points
    4736

    Args:
        model: a causal language model of transformers.
        calibration: what solvers that learn need (the others do not look at it): token ids (sequences, seq_len), an
            iterable of token ids, or an iterable of mappings with `input_ids` and `attention_mask`.
        keep: linears that stay as they are, by the end of their names or of a module's that they lie in: `["o_proj"]`,
            `["layers.0", "layers.1?.mlp"]`. `*` and `?` stand for anything.
        progress: called with (done, total, name) after each layer.

    Raises:
        UnsupportedModel: no stack of blocks was found.
        ValueError: a layer does not suit the grid, holds NaN, or never saw a token; `keep` names nothing; calibration
            data is missing. Before any layer is changed, if it can be known before.
    """
    name, blocks = _stack(model, keep)
    found = [_kept_apart(linears(block, f"{name}.{index}"), keep) for index, block in enumerate(blocks)]
    _check(model, name, blocks, found, recipe, keep)
    with _evaluating(model):
        running = block_inputs(model, blocks, _calibration(calibration, found)) if recipe.solver.needs_hessian else []
        done, total = 0, sum(map(len, found))
        for index, block in enumerate(blocks):
            for layers, hessian in _inputs(block, found[index], running, index):
                for layer_name, layer in zip(layers, _solve(layers, recipe, hessian)):
                    model.set_submodule(layer_name, layer)
                    done += 1
                    if progress:
                        progress(done, total, layer_name)
            # the last references to the weights that are now replaced
            found[index] = {}
            if index + 1 < len(blocks):
                for inputs in running:
                    inputs.hidden = inputs.run(index, block)
    return mark(model, recipe)


def _inputs(
    block: nn.Module, found: dict[str, nn.Linear], running: list[BlockInputs], index: int
) -> Iterator[tuple[dict[str, nn.Linear], Tensor | None]]:
    """The linears of `block` that share an input, and its second moments now that those before them are replaced."""
    passes = [(partial(inputs.run, index, block), inputs.mask) for inputs in running]
    if passes:
        groups = shared_inputs(found, passes[0][0]) if found else []
    else:
        groups = [SharedInput([name], 0) for name in found]
    for names, calls in groups:
        hessian = _hessian(names[0], found[names[0]], calls, passes) if passes else None
        yield {name: found[name] for name in names}, hessian


def _hessian(name: str, linear: nn.Linear, calls: int, passes: list[Pass]) -> Tensor:
    moments = second_moments(linear, calls, passes)
    if not moments.count:
        raise ValueError(
            f"{name} saw no token of the calibration data; give more of it, or skip the layer with keep=[{name!r}]"
        )
    if not moments.sum.isfinite().all():
        raise ValueError(f"{name}: its inputs on the calibration data hold NaN or infinity")
    return moments.mean


def _solve(layers: dict[str, nn.Linear], recipe: Recipe, hessian: Tensor | None) -> Iterator[QuantizedLinear]:
    """Quantised layers for linears with the same inputs: solved as one tall weight, as solvers treat rows one by one."""
    weight = torch.cat([linear.weight for linear in layers.values()]).float()
    try:
        codes, params = recipe.solver.solve(weight, recipe.grid, hessian)
    except ValueError as error:
        raise ValueError(f"{', '.join(layers)}: {error}") from error
    sizes = [linear.out_features for linear in layers.values()]
    parts = (tensor.split(sizes) for tensor in (codes, *params))
    for linear, codes, *params in zip(layers.values(), *parts):
        layer = QuantizedLinear.from_linear(linear, codes, IntParams(*params), recipe.grid)
        layer.relative_error = relative_error(linear.weight, layer.dequantize(), hessian)
        yield layer


def _calibration(calibration: Any, found: list[dict[str, nn.Linear]]) -> list[dict[str, Tensor]]:
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
    return data


def _stack(model: Any, keep: Sequence[str]) -> tuple[str, nn.ModuleList]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()) or getattr(model, "hf_quantizer", None):
        raise ValueError("the model is quantised already; start from the original")
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of names, got the string {keep!r}; use keep=[{keep!r}]")
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    for pattern in keep:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"keep names {pattern!r}, which is no part of {type(model).__name__}")
    return find_blocks(model)


def _kept_apart(found: dict[str, nn.Linear], keep: Sequence[str]) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in found.items() if not matches(name, keep)}


def _check(
    model: nn.Module,
    name: str,
    blocks: nn.ModuleList,
    found: list[dict[str, nn.Linear]],
    recipe: Recipe,
    keep: Sequence[str],
) -> None:
    """Everything that could go wrong with the weights, before any of them is changed."""
    derived = [n for n, m in blocks.named_modules(prefix=name) if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    if unsaid := [other for other in derived if not matches(other, keep)]:
        warnings.warn(
            f"{len(unsaid)} linears of classes of their own stay as they are: {unsaid[0]} and the like; "
            f"say so with keep=[{unsaid[0].split('.')[-1]!r}]",
            stacklevel=4,
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
            try:
                recipe.grid.groups(linear.in_features)
            except ValueError as error:
                raise ValueError(f"{full_name}: {error}; or {way_out}") from error
            if not linear.weight.isfinite().all():
                raise ValueError(f"{full_name}: the weight holds NaN or infinity; mend the checkpoint, or {way_out}")
            if len(tied := owners[id(linear.weight)]) > 1:
                raise NotImplementedError(
                    f"{' and '.join(tied)} are one parameter, which is not supported yet; {way_out}"
                )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped out; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
