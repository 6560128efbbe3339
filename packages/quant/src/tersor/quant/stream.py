"""Quantising checkpoints that are larger than memory: block by block, from shards to shards."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tersor.quant.calibration import BlockInputs, block_inputs, passed_through
from tersor.quant.checkpoint import FORMAT_VERSION, mark
from tersor.quant.export.target import check_target
from tersor.quant.grid import Grid
from tersor.quant.layers import advance
from tersor.quant.linear import QuantizedLinear
from tersor.quant.processes import num_processes
from tersor.quant.quantize import Progress, dense_inputs, quantise_block
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme
from tersor.quant.shards import Source, Unfinished, copy_tokenizer_and_processor
from tersor.quant.survey import calibration_batches, planned
from tersor.quant.transform import (
    BlockTransform,
    CalibratedTransform,
    ModelTransform,
    SearchedTransform,
    TaughtTransform,
)
from tersor.quant.tuning import ModelTuning


@torch.no_grad()
def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep: Sequence[str] = (),
    allocation: Mapping[str, Grid] | None = None,
    progress: Progress | None = None,
) -> None:
    """What `quantize` and `save_pretrained` make of a checkpoint, bit for bit, with one block of it in memory at a time.

    Memory holds about two blocks (one as it is read, and what is computed with it), and of calibration data the
    hidden states of one block; at the start, if there is data, and at the end the embeddings and the head. Blocks are
    written one by one: after a kill, the same call goes on with the first block that is missing, and ends with the
    same files. Until then they lie in a directory beside the target.

    Args:
        source: directory of a causal language model, as `save_pretrained` writes it.
        target: directory that does not exist yet. It appears once all is written, with the tokenizer of the source.
        recipe, calibration, keep, allocation, progress: as of `quantize`.

    Raises:
        NotImplementedError: the recipe has a transform that looks at the whole model at once.
        ValueError: as of `quantize`; the source holds no safetensors, or tensors that are not named as the model's;
            beside the target lies unfinished work of another recipe, source or data.
    """
    checkpoint, target = Source(Path(source)), Path(target)
    check_target(target)
    if num_processes() > 1:
        raise NotImplementedError("several processes would write the same files: stream in one, or use quantize")
    for transform in recipe.transforms:
        if isinstance(transform, ModelTransform | CalibratedTransform | SearchedTransform):
            raise NotImplementedError(
                f"{type(transform).__name__} needs all blocks at once: load the model, use quantize and save_pretrained"
            )
    if recipe.allocation and allocation is None:
        raise NotImplementedError(
            "grids are chosen with all blocks at once: give allocation=recipe.allocation.choose(model, recipe, calibration)"
        )
    for tuning in recipe.tuning:
        if isinstance(tuning, ModelTuning):
            raise NotImplementedError(
                f"{type(tuning).__name__} needs all blocks at once: load the model, use quantize and save_pretrained"
            )
    model = _skeleton(checkpoint)
    blocks, found, schemes = planned(model, recipe, keep, allocation or {})
    outside = _outside(model, blocks)
    _check_names(model, checkpoint)
    data = calibration_batches(calibration, found) if recipe.needs_data else []
    layers = [name for names in found for name in names]
    job = {
        "format_version": FORMAT_VERSION,
        "recipe": repr(recipe),
        "keep": list(keep),
        "allocation": {name: repr(grid) for name, grid in (allocation or {}).items()},
        "calibration": _checksum(data),
        "source": checkpoint.checksum(finite=[f"{name}.weight" for name in layers]),
    }
    work = Unfinished(target, job)
    running = _first_inputs(model, blocks, outside, checkpoint, data)
    dense = dense_inputs(recipe, running)
    done = 0
    for index, block in enumerate(blocks):
        shard, prefix = _shard(index, blocks), f"{_name_of(model, block)}."
        further = running if index + 1 < len(blocks) else []
        if shard in work.shards:
            if dense and further:
                _assign(block, {key: checkpoint.tensor(prefix + key) for key in block.state_dict()})
                advance(block, dense, index)
            _put_layers(model, {name: Scheme.from_dict(pieces) for name, pieces in work.shards[shard].items()})
            if further:
                stored = work.load(shard)
                _assign(block, {key.removeprefix(prefix): tensor for key, tensor in stored.items()})
            done += len(found[index])
        else:
            _assign(block, {key: checkpoint.tensor(prefix + key) for key in block.state_dict()})
            for change in recipe.transforms:
                if isinstance(change, BlockTransform | TaughtTransform):
                    change.check_block(block, running, index)
            for name in quantise_block(model, block, index, found[index], recipe, schemes, running, dense):
                done += 1
                if progress:
                    progress(done, len(layers), name)
            stored = {prefix + key: tensor for key, tensor in block.state_dict().items()}
            work.add(shard, stored, {name: model.get_submodule(name).scheme.to_dict() for name in found[index]})
        advance(block, further, index)
        block.to("meta")
        # the last references to the weights that were replaced
        found[index] = {}
    work.add(_shard(len(blocks), blocks), {key: _like(model, key, checkpoint.tensor(key)) for key in outside}, None)
    _save_config(mark(model, recipe), checkpoint.directory, work.directory)
    work.finish()


def _skeleton(source: Source) -> Any:
    """The model with parameters on the meta device; buffers that it computes for itself are there."""
    config = AutoConfig.from_pretrained(source.directory)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source.directory} is quantised already; start from the original")
    dtype = config.dtype or source.tensor(next(iter(source.files))).dtype
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # one that is there already is tied: it must stay the same object
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    finally:
        nn.Module.register_parameter = register


def _outside(model: Any, blocks: nn.ModuleList) -> list[str]:
    """What is saved of the model besides its blocks; of tied parameters one."""
    prefix, once = f"{_name_of(model, blocks)}.", dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    return [name for name in model.state_dict() if not name.startswith(prefix) and name not in tied]


def _check_names(model: Any, source: Source) -> None:
    wanted = model.state_dict().keys()
    tied = wanted - dict(model.named_parameters()).keys() - dict(model.named_buffers()).keys()
    if missing := sorted(wanted - tied - source.files.keys()):
        raise ValueError(
            f"{source.directory} has no tensor {missing[0]}, as {type(model).__name__} names it, and lacks {len(missing)} in "
            f"all; load the model with from_pretrained and write it with save_pretrained"
        )
    if unknown := sorted(source.files.keys() - wanted):
        warnings.warn(f"{len(unknown)} tensors are no part of the model and left out: {unknown[0]}", stacklevel=4)


def _first_inputs(
    model: Any, blocks: nn.ModuleList, outside: list[str], source: Source, data: list[dict[str, Tensor]]
) -> list[BlockInputs]:
    """What the blocks are called with, given that all of them but the first are still to come."""
    if not data:
        return []
    first, prefix = blocks[0], f"{_name_of(model, blocks[0])}."
    # the output head is not called
    needed = {id(parameter) for parameter in model.base_model.parameters()}
    named = dict(model.named_parameters())
    for name in outside:
        if name not in named or id(named[name]) in needed:
            _assign(model, {name: source.tensor(name)}, strict=False)
    _assign(first, {key: source.tensor(prefix + key) for key in first.state_dict()})
    with passed_through(blocks):
        running = block_inputs(model, blocks, data)
    for name in outside:
        if name in named:
            _assign(model, {name: named[name]}, strict=False)
    first.to("meta")
    return running


def _put_layers(model: Any, schemes: Mapping[str, Scheme]) -> None:
    for name, scheme in schemes.items():
        linear = model.get_submodule(name)
        bias, dtype = linear.bias is not None, linear.weight.dtype
        layer = QuantizedLinear(linear.in_features, linear.out_features, bias, scheme, "meta", dtype)
        model.set_submodule(name, layer)


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Put tensors in the place of those of these names, in the dtype of those."""
    module.load_state_dict({key: _like(module, key, t) for key, t in tensors.items()}, strict=strict, assign=True)


def _like(module: nn.Module, key: str, tensor: Tensor) -> Tensor:
    owner, _, name = key.rpartition(".")
    return tensor.to(getattr(module.get_submodule(owner), name).dtype)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _shard(index: int, blocks: nn.ModuleList) -> str:
    """File of block `index`; what is outside of the blocks comes last."""
    return f"model-{index + 1:05}-of-{len(blocks) + 1:05}.safetensors"


def _checksum(data: list[dict[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in data:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save_config(model: Any, source: Path, directory: Path) -> None:
    """What `save_pretrained` writes beside the tensors, and the tokenizer of the source."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(directory)
    elif model.can_generate():
        model.generation_config.save_pretrained(directory)
    copy_tokenizer_and_processor(source, directory)
