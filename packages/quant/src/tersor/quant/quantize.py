"""The walk: block by block, each on what the quantised blocks before it put out."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quant.blocks import find_blocks, linears
from tersor.quant.calibration import BlockInputs, SecondMoments, batches, block_inputs, collecting
from tersor.quant.checkpoint import mark
from tersor.quant.linear import QuantizedLinear
from tersor.quant.recipe import Recipe
from tersor.quant.solver import relative_error

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Any:
    """`model`, its blocks' linears replaced in place by quantised ones; embeddings and the output head stay.

    Save with `save_pretrained`; `from_pretrained` loads the result wherever `tersor.quant` has been imported. Each new
    layer knows its `relative_error` on the calibration data.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tersor.quant import quantize, recipes
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    >>> model = quantize(LlamaForCausalLM(config), recipes.rtn(bits=4, group_size=32))
    >>> model.model.layers[0].mlp.up_proj.nbytes  # 128 x 64 weights at 4 bits, 256 scales of 2 bytes, zero points
    4736

    Args:
        model: a causal language model of transformers.
        calibration: what solvers that learn need: token ids (sequences, seq_len), an iterable of them, or an iterable of
            mappings with `input_ids` and `attention_mask`.
        keep: patterns (`*.mlp.down_proj`) of linears that stay as they are.
        progress: called with (done, total, name) after each block.

    Raises:
        UnsupportedModel: no stack of blocks was found.
        ValueError: a layer does not suit the grid, holds NaN, or never saw a token; calibration data is missing.
    """
    name, blocks = find_blocks(model)
    found = [linears(block, f"{name}.{index}", keep) for index, block in enumerate(blocks)]
    _check(model, blocks, name, found, recipe, keep)
    running: list[BlockInputs] = []
    if recipe.solver.needs_hessian:
        running = [block_inputs(model, blocks, batch) for batch in _calibration(calibration, found)]
    for index, block in enumerate(blocks):
        moments = _moments(index, block, found[index], running) if running else {}
        for full_name, linear in found[index].items():
            _replace(model, full_name, _solve(full_name, linear, recipe, moments.get(full_name)))
        for inputs in running:
            inputs.hidden = inputs.run(index, block)
        if progress:
            progress(index + 1, len(blocks), f"{name}.{index}")
    return mark(model)


def _moments(
    index: int, block: nn.Module, found: dict[str, nn.Linear], running: list[BlockInputs]
) -> dict[str, SecondMoments]:
    if not found:
        return {}
    with collecting(found) as (moments, mask):
        for inputs in running:
            mask[0] = inputs.mask
            inputs.run(index, block)
    return moments


def _solve(name: str, linear: nn.Linear, recipe: Recipe, moments: SecondMoments | None) -> QuantizedLinear:
    if recipe.solver.needs_hessian and (moments is None or not moments.count):
        raise ValueError(
            f"{name} saw no token of the calibration data; give more of it, or skip the layer with keep=[{name!r}]"
        )
    hessian = moments.mean if moments else None
    weight = linear.weight.float()
    try:
        result = recipe.solver.solve(weight, recipe.grid, hessian)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    layer = QuantizedLinear.from_linear(linear, result.codes, result.params, recipe.grid)
    layer.relative_error = relative_error(weight, layer.dequantize(), hessian)
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _calibration(calibration: Any, found: list[dict[str, nn.Linear]]) -> list[Any]:
    if calibration is None:
        raise ValueError("this recipe learns from data: give calibration=token ids (sequences, seq_len)")
    rows = batches(calibration)
    tokens = sum(row["input_ids"].numel() for row in rows)
    widest = max(linear.in_features for layers in found for linear in layers.values())
    if tokens < 4 * widest:
        warnings.warn(
            f"{tokens} calibration tokens are few for layers with {widest} inputs; use at least {4 * widest}",
            stacklevel=3,
        )
    return rows


def _check(
    model: nn.Module,
    blocks: nn.ModuleList,
    name: str,
    found: list[dict[str, nn.Linear]],
    recipe: Recipe,
    keep: Sequence[str],
) -> None:
    """Everything that could go wrong with the weights, before any of them is changed."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised already; start from the original")
    for block_name, parameter in blocks.named_parameters():
        if parameter.ndim == 3:
            raise NotImplementedError(
                f"{name}.{block_name} holds its experts in one 3-D parameter, which is not supported yet"
            )
    if not any(found):
        raise ValueError(f"no linear layer of {name} is left to quantise: keep={list(keep)} matches all of them")
    for layers in found:
        for full_name, linear in layers.items():
            try:
                recipe.grid.groups(linear.in_features)
            except ValueError as error:
                raise ValueError(f"{full_name}: {error}; or skip the layer with keep=[{full_name!r}]") from error
            if not torch.isfinite(linear.weight).all():
                raise ValueError(f"{full_name}: the weight holds NaN or infinity; the checkpoint is damaged")
