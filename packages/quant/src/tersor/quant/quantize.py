"""The walk: block by block, and in each one input by input, on what the layers quantised before put out."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quant.calibration import BlockInputs, first_inputs
from tersor.quant.checkpoint import mark
from tersor.quant.experts import separated_experts
from tersor.quant.grid import Grid
from tersor.quant.layers import advance, layers_by_input, solve
from tersor.quant.linear import QuantizedLinear
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme
from tersor.quant.survey import all_called, calibration_batches, check_model, planned
from tersor.quant.teacher import Teacher, rows
from tersor.quant.transform import (
    BlockTransform,
    CalibratedTransform,
    ModelTransform,
    RangeTransform,
    SearchedTransform,
    TaughtTransform,
)
from tersor.quant.tuning import BlockTuning, ModelTuning

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def quantize(
    model: Any,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep: Sequence[str] = (),
    allocation: Mapping[str, Grid] | None = None,
    progress: Progress | None = None,
) -> Any:
    """`model`, its blocks' linears replaced in place by quantised ones; embeddings and the output head stay.

    Each layer is fitted to what it is given once all layers before it are quantised; layers that share an input are
    quantised together, and experts that share one parameter become linears each. Save with `save_pretrained`;
    `from_pretrained` loads the result wherever `tersor.quant` has been imported. Each new layer knows its
    `relative_error`: of its outputs on the calibration data, or of its weights where no piece of the recipe looks at the
    layer's inputs; as the solver left it, before any tuning. Where `torch.distributed` runs, every process takes its part
    of the calibration data, and all end up with the same model: let one of them save it.

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
        allocation: linears whose grid is not the recipe's, by name. None: what the recipe's allocation finds, if it has
            one.
        progress: called with (done, total, name) after each layer.

    Raises:
        UnsupportedModel: no stack of blocks was found.
        ValueError: a layer does not suit the grid, holds NaN, or never saw a token; `keep` names nothing; calibration
            data is missing. Before any layer is changed, if it can be known before.
    """
    check_model(model, keep)
    with separated_experts(model, keep), evaluating(model):
        if allocation is None and recipe.allocation:
            allocation = recipe.allocation.choose(model, recipe, calibration, keep)
        blocks, found, schemes = planned(model, recipe, keep, allocation or {})
        data = calibration_batches(calibration, found) if recipe.needs_data else []
        tunings = [tuning for tuning in recipe.tuning if isinstance(tuning, ModelTuning)]
        teachers = [Teacher(model, rows(data), tuning.top_k) for tuning in tunings]
        fold_model(model, recipe, data)
        with all_called(found if recipe.needs_hessian else []) as waiting:
            running = first_inputs(model, blocks, data, waiting) if data else []
        dense = dense_inputs(recipe, running)
        grids = {linear: schemes[name].grid for layers in found for name, linear in layers.items()}
        recipe = searched(recipe, blocks, running, grids)
        del grids, waiting  # they would keep the weights that are replaced
        changes = [t for t in recipe.transforms if isinstance(t, BlockTransform | TaughtTransform)]
        for index, block in enumerate(blocks):
            for change in changes:
                change.check_block(block, running, index)
        done, total = 0, sum(map(len, found))
        for index, block in enumerate(blocks):
            for layer_name in quantise_block(model, block, index, found[index], recipe, schemes, running, dense):
                done += 1
                if progress:
                    progress(done, total, layer_name)
            # the last references to the weights that are now replaced
            found[index] = {}
            if index + 1 < len(blocks):
                advance(block, running, index)
        for tuning, teacher in zip(tunings, teachers):
            tuning.tune(model, teacher)
    forget_originals(model)
    return mark(model, recipe)


def fold_model(model: Any, recipe: Recipe, data: list[dict[str, Tensor]]) -> None:
    """What the recipe's transforms change in the model as a whole."""
    for change in recipe.transforms:
        if isinstance(change, ModelTransform):
            change.fold(model)
        elif isinstance(change, CalibratedTransform):
            change.fold_calibrated(model, data)


def quantise_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    found: dict[str, nn.Linear],
    recipe: Recipe,
    schemes: dict[str, Scheme],
    running: list[BlockInputs],
    dense: list[BlockInputs],
) -> Iterator[str]:
    """Replace the linears `found` in a block whose inputs are known; gives their names, each once it is done.

    Afterwards `dense` holds what the next original block is called with.
    """
    original = copy.deepcopy(block) if dense else block
    grids, ranges = {linear: schemes[name].grid for name, linear in found.items()}, {}
    for change in recipe.transforms:
        if isinstance(change, BlockTransform):
            change.fold_block(block, running, index, grids)
        elif isinstance(change, TaughtTransform):
            change.fold_taught(block, original, running, dense, index, grids)
    for change in recipe.transforms:
        if grids and isinstance(change, RangeTransform):
            ranges |= change.ranges(block, running, index, grids)
    for layers, moments in layers_by_input(block, found, running if recipe.needs_hessian else [], index):
        for name, layer in solve(layers, recipe, schemes, moments, ranges):
            model.set_submodule(name, layer)
            yield name
    for tuning in recipe.tuning:
        if isinstance(tuning, BlockTuning):
            tuning.tune_block(block, original, running, dense, index)
    if not any(isinstance(tuning, ModelTuning) for tuning in recipe.tuning):
        forget_originals(block)
    advance(original, dense, index)


def forget_originals(module: nn.Module) -> None:
    """Let go of the weights that quantised layers kept for the recipe's tunings."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer.original = None


def dense_inputs(recipe: Recipe, running: list[BlockInputs]) -> list[BlockInputs]:
    """What the original blocks are called with, if the recipe has pieces that compare with them."""
    if not any(isinstance(piece, BlockTuning | TaughtTransform) for piece in (*recipe.tuning, *recipe.transforms)):
        return []
    return [replace(inputs) for inputs in running]


def searched(recipe: Recipe, blocks: Any, running: list[BlockInputs], grids: Mapping[nn.Linear, Grid]) -> Recipe:
    """The recipe with what its `SearchedTransform`s choose in their places."""
    transforms: list[Any] = []
    for transform in recipe.transforms:
        if isinstance(transform, SearchedTransform):
            transforms.extend(transform.choose(blocks, running, grids))
        else:
            transforms.append(transform)
    return replace(recipe, transforms=tuple(transforms))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped out; afterwards every module is in the mode that it was in."""
    # names: the modules themselves would keep the weights that are replaced
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = name in training
