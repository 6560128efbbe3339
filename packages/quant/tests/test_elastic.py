"""Elastic loading: one checkpoint, any size, and only that much of it read."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tersor.quant import quantize, recipes
from tersor.quant.elastic import load_stack, save_stack, stacks
from tersor.quant.linear import QuantizedLinear

BLOCKS = 3


class Saved(NamedTuple):
    model: PreTrainedModel
    directory: Path
    order: list[str]
    least: int  # bytes with one block of each layer
    most: int


def nbytes(model: PreTrainedModel) -> int:
    """What is saved; tied weights once."""
    state = model.state_dict()
    return sum(t.nbytes for name, t in (*model.named_parameters(), *model.named_buffers()) if name in state)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def random_order(model: PreTrainedModel) -> list[str]:
    """Within levels, as `StackOrder` finds it."""
    rng, names = random.Random(0), list(stacks(model))
    return [name for _ in range(BLOCKS - 1) for name in rng.sample(names, len(names))]


def save(model: PreTrainedModel, ids: Tensor, directory: Path) -> Saved:
    model = quantize(model, recipes.bitstack(BLOCKS, 4), ids, keep=["layers.0.self_attn"])
    order = random_order(model)
    save_stack(model, directory, order)
    return Saved(
        model, directory, order, json.loads((directory / "stack_order.json").read_text())["least_nbytes"], nbytes(model)
    )


@pytest.fixture
def saved(make_model, ids, tmp_path) -> Saved:
    return save(make_model(), ids, tmp_path / "stack")


def budgets(saved: Saved) -> list[int]:
    return [saved.least, (2 * saved.least + saved.most) // 3, (saved.least + 2 * saved.most) // 3, saved.most]


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in a.state_dict().items())


def test_all_of_it_is_what_was_saved(kind, make_model, ids, tmp_path):
    saved = save(make_model(kind, torch.bfloat16), ids, tmp_path / "stack")
    whole = load_stack(saved.directory, saved.most)
    assert whole.nbytes == saved.most == nbytes(whole.model)
    assert same(whole.model, saved.model)
    plain = AutoModelForCausalLM.from_pretrained(saved.directory)
    for model in (whole.model, plain):
        assert model.dtype == torch.bfloat16
        assert torch.equal(logits(model, ids), logits(saved.model, ids))


def test_any_budget_is_kept_and_used_up(saved, ids):
    """What is loaded is a prefix of the order, and one step more would be too much."""
    before = -1
    for budget in range(saved.least, saved.most + 1, (saved.most - saved.least) // 7):
        stack = load_stack(saved.directory, budget)
        assert stack.nbytes == nbytes(stack.model) <= budget
        steps = sum(stack.blocks.values()) - len(stack.blocks)
        assert steps > before
        before = steps
        further = dict.fromkeys(stack.blocks, 1)
        for name in saved.order[:steps]:
            further[name] += 1
        assert stack.blocks == further == {n: layer.scheme.grid.blocks for n, layer in stacks(stack.model).items()}
        if steps < len(saved.order):
            wanted = saved.model.get_submodule(saved.order[steps])
            assert isinstance(wanted, QuantizedLinear)
            assert stack.nbytes + wanted.nbytes // BLOCKS > budget
        assert logits(stack.model, ids).isfinite().all()


def test_more_blocks_are_nearer_to_the_whole(saved, ids):
    whole = logits(saved.model, ids)
    errors = [float((logits(load_stack(saved.directory, b).model, ids) - whole).square().sum()) for b in budgets(saved)]
    assert errors[0] > errors[-2] > errors[-1] == 0


def test_grown_and_shrunk_models_are_those_loaded_at_that_size(saved, ids):
    sizes = budgets(saved)
    stack = load_stack(saved.directory, sizes[0])
    for budget in (*sizes[1:], *reversed(sizes[:-1])):
        (stack.grow if budget > stack.nbytes else stack.shrink)(budget)
        loaded = load_stack(saved.directory, budget)
        assert stack.blocks == loaded.blocks
        assert same(stack.model, loaded.model)
        assert torch.equal(logits(stack.model, ids), logits(loaded.model, ids))


def test_growing_drops_nothing_and_shrinking_reads_nothing(saved):
    stack = load_stack(saved.directory, saved.most)
    stack.grow(saved.least)
    assert stack.nbytes == saved.most
    for path in saved.directory.glob("*.safetensors"):
        path.unlink()
    stack.shrink(saved.least)
    assert stack.nbytes == saved.least == nbytes(stack.model)
    stack.shrink(saved.most)
    assert stack.nbytes == saved.least


def spoil(path: Path, kept: set[str]) -> int:
    """Overwrite all of a safetensors file but its header and the tensors `kept`; the number of bytes overwritten."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header, spoilt = json.loads(content[8 : 8 + size]), 0
    for name, about in header.items():
        if name != "__metadata__" and name not in kept:
            start, stop = (8 + size + offset for offset in about["data_offsets"])
            content[start:stop] = b"\xff" * (stop - start)
            spoilt += stop - start
    path.write_bytes(content)
    return spoilt


def test_nothing_but_the_bytes_of_the_blocks_is_read(saved, ids):
    """Whatever stands in the rest of the file."""
    (path,) = saved.directory.glob("*.safetensors")
    whole = path.read_bytes()
    small, large = budgets(saved)[1:3]
    stack = load_stack(saved.directory, small)
    expected = load_stack(saved.directory, large).model
    few, more = set(stack.model.state_dict()), set(expected.state_dict())
    assert few < more
    assert spoil(path, few) > 0
    again = load_stack(saved.directory, small)
    assert same(again.model, stack.model)
    # what it has already is not read again
    path.write_bytes(whole)
    spoil(path, more - few)
    stack.grow(large)
    assert same(stack.model, expected)


def test_the_file_is_a_seek_table(saved):
    (path,) = saved.directory.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    for name, layer in stacks(saved.model).items():
        for block in range(BLOCKS):
            assert {f"{name}.{buffer}" for buffer in layer.scheme.grid.block_buffers(block)} <= names


def test_checkpoints_in_several_files_are_one_stack(saved):
    small, large = budgets(saved)[1:3]
    expected = load_stack(saved.directory, large).model
    saved.model.save_pretrained(saved.directory, max_shard_size="20KB")
    assert len(list(saved.directory.glob("*.safetensors"))) > 1
    stack = load_stack(saved.directory, small)
    stack.grow(large)
    assert same(stack.model, expected)


def test_what_is_held_is_a_model_like_any_other(saved, ids, tmp_path):
    stack = load_stack(saved.directory, budgets(saved)[1])
    stack.grow(budgets(saved)[2])
    stack.model.save_pretrained(tmp_path / "part")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert same(part, stack.model)
    assert torch.equal(logits(part, ids), logits(stack.model, ids))


def test_a_budget_below_one_block_of_each_layer_is_refused(saved):
    message = f"budget = {saved.least - 1} bytes is too small: .* takes {saved.least}"
    with pytest.raises(ValueError, match=message):
        load_stack(saved.directory, saved.least - 1)
    stack = load_stack(saved.directory, saved.most)
    with pytest.raises(ValueError, match=message):
        stack.shrink(saved.least - 1)
    assert stack.nbytes == saved.most


def test_orders_that_are_not_of_the_model_are_refused(saved, tmp_path):
    first = saved.order[0]
    with pytest.raises(ValueError, match=f"order names '{first}' 1 times, where 2 blocks are to be ordered"):
        save_stack(saved.model, tmp_path / "other", saved.order[1:])
    with pytest.raises(ValueError, match="order names 'lm_head' 1 times, where 0 blocks"):
        save_stack(saved.model, tmp_path / "other", [*saved.order, "lm_head"])
    assert not (tmp_path / "other").exists()


def test_other_models_and_directories_are_refused(make_model, tmp_path):
    model = quantize(make_model(), recipes.rtn(4, 32))
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is a SignLowRankStack"):
        save_stack(model, tmp_path / "other", [])
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain has no stack_order.json; write the model with save_stack"):
        load_stack(tmp_path / "plain", 2**30)
