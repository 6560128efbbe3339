"""Calibration: the data, the inputs of blocks, the second moments."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.quant.blocks import find_blocks, linears
from tersor.quant.calibration import (
    SecondMoments,
    batches,
    block_inputs,
    first_inputs,
    num_tokens,
    second_moments,
    shared_inputs,
)

a_few = settings(max_examples=25, deadline=None, derandomize=True)


def moments_of(*parts: torch.Tensor) -> SecondMoments:
    moments = SecondMoments(parts[0].shape[-1])
    for x in parts:
        moments.update(x)
    return moments


@a_few
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_moments_of_parts_add_up_to_those_of_the_whole(sizes, seed):
    # small integers: every sum is exact, so that the order of adding cannot show
    x = torch.randint(-9, 10, (sum(sizes), 4), generator=torch.Generator().manual_seed(seed)).float()
    whole, streamed = moments_of(x), moments_of(*x.split(sizes))
    merged = sum((moments_of(part) for part in x.split(sizes)), start=SecondMoments(4))
    for moments in (streamed, merged):
        assert torch.equal(moments.sum, whole.sum)
        assert torch.equal(moments.maxima, whole.maxima)
        assert moments.count == whole.count == sum(sizes)
    assert torch.equal(whole.sum, x.double().T @ x.double())
    assert torch.equal(whole.maxima, torch.cat([x.abs(), torch.zeros(1, 4)]).amax(0))


@pytest.mark.parametrize("width", [1, 128, 300])
def test_moments_are_the_product_and_symmetric_whatever_the_width(width, generator):
    """They are computed in stripes, of which 300 inputs have three; what is asked for midway changes nothing later."""
    parts = torch.randn(2, 64, width, generator=generator)
    moments = moments_of(parts[0])
    assert torch.equal(moments.sum, moments.sum.T)
    moments.update(parts[1])
    x = parts.flatten(0, 1).double()
    assert torch.equal(moments.sum, moments.sum.T)
    # 2**-24 for each of the products, and for sums of 64 of them
    torch.testing.assert_close(moments.sum, x.T @ x, rtol=0, atol=64 * 2**-24 * float(x.square().sum(0).max()))


def test_merging_leaves_both_parts_as_they_were(generator):
    first, second = (moments_of(torch.randn(5, 3, generator=generator)) for _ in range(2))
    before = first.sum.clone(), second.sum.clone()
    merged = first + second
    merged.update(torch.ones(1, 3))
    assert torch.equal(first.sum, before[0])
    assert torch.equal(second.sum, before[1])


def test_the_mean_does_not_drift_over_many_tokens():
    moments = SecondMoments(2)
    for _ in range(1000):
        moments.update(torch.full((4, 2), 0.1))
    # 2**-24: 0.1 * 0.1 is rounded to float32, nothing else
    torch.testing.assert_close(moments.mean, torch.full((2, 2), 0.01).double(), rtol=2**-22, atol=0)


def test_no_tokens_have_moments_of_zero():
    assert torch.equal(SecondMoments(3).mean, torch.zeros(3, 3).double())


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: ids,
        lambda ids: list(ids),
        lambda ids: iter(ids.split(3)),
        lambda ids: [{"input_ids": row[None], "labels": row[None]} for row in ids],
        lambda ids: [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
    ],
)
def test_every_form_of_calibration_data_holds_the_same_tokens(form, ids):
    found = batches(form(ids))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), ids)
    assert all(set(batch) <= {"input_ids", "attention_mask"} for batch in found)
    assert sum(map(num_tokens, found)) == ids.numel()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "calibration is empty"),
        (torch.empty(0, 8, dtype=torch.long), ValueError, "calibration is empty"),
        ("some text", TypeError, "got str"),
        (7, TypeError, "got int"),
        (["some text"], TypeError, "must hold token ids or mappings with input_ids, got str"),
        ([{"ids": torch.ones(1, 2)}], TypeError, "got dict"),
        ({"input_ids": torch.ones(1, 2).long()}, TypeError, "got dict"),
        (torch.ones(2, 8), TypeError, "must be integers .* got torch.float32"),
    ],
)
def test_what_is_no_calibration_data_is_named(data, error, message):
    with pytest.raises(error, match=message):
        batches(data)


@torch.no_grad()
def test_blocks_run_one_by_one_give_what_the_model_gives(make_model, kind, ids):
    """Masks, positions and kinds of attention included."""
    model = make_model(kind)
    _, blocks = find_blocks(model)
    for inputs, batch in zip(block_inputs(model, blocks, batches(ids)), batches(ids)):
        for index, block in enumerate(blocks):
            inputs.hidden = inputs.run(index, block)
        expected = model.base_model(**batch, use_cache=False).last_hidden_state
        assert torch.equal(model.base_model.norm(inputs.hidden), expected)


def test_masks_and_positions_that_repeat_are_held_once(make_model, ids):
    model = make_model("gemma3")
    _, blocks = find_blocks(model)
    found = block_inputs(model, blocks, [{"input_ids": row[None]} for row in ids])
    held = {id(value) for inputs in found for keywords in inputs.keywords for value in tensors(keywords)}
    of_one = {id(value) for keywords in found[0].keywords for value in tensors(keywords)}
    assert held == of_one


def tensors(value) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_inputs_are_noted_without_leaving_hooks_behind(make_model, ids):
    model = make_model()
    _, blocks = find_blocks(model)
    bad = ids.clone()
    bad[-1, -1] = 10**6  # no such token
    for note in (block_inputs, partial(first_inputs, waiting=[])):
        with pytest.raises(IndexError):
            note(model, blocks, batches(bad.split(4)))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not any("forward" in vars(block) for block in blocks)


def counted(block: nn.Module) -> list[int]:
    """Grows with every call of what is in the block."""
    calls: list[int] = []
    next(block.children()).register_forward_hook(lambda *_: calls.append(1))
    return calls


def assert_same_inputs(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        leaves, others = (torch.utils._pytree.tree_leaves((i.arguments, i.keywords)) for i in (one, other))
        for a, b in zip(leaves, others, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("waiting", "whole"), [([], 1), (["an expert"], 5)], ids=["all met", "one missing"])
def test_blocks_after_the_first_are_run_only_until_all_linears_are_met(waiting, whole, make_model, kind, ids):
    model = make_model(kind)
    _, blocks = find_blocks(model)
    mask = torch.ones_like(ids)
    mask[::3, -5:] = 0
    data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4))]
    expected, calls = block_inputs(model, blocks, data), counted(blocks[1])
    found = first_inputs(model, blocks, data, waiting)
    # one more than there are batches: the first sequence is run before all
    assert len(calls) == whole
    assert_same_inputs(found, expected)
    assert all((one.mask is None) == (other.mask is None) for one, other in zip(found, expected))
    assert not any("forward" in vars(block) for block in blocks)


class Block(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, hidden: Tensor, told: Tensor | None = None) -> Tensor:
        return self.linear(hidden)


class Chain(nn.Module):
    """Blocks of several widths; if it `tells`, each is given a number that the one before it computed."""

    device = torch.device("cpu")

    def __init__(self, *widths: int, tells: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*pair) for pair in pairwise(widths))
        self.norm, self.tells = nn.LayerNorm(widths[-1]), tells

    @property
    def base_model(self) -> "Chain":
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = nn.functional.one_hot(input_ids, 8).float()
        for block in self.blocks:
            hidden = block(hidden, hidden.mean()) if self.tells else block(hidden)
        return self.norm(hidden)


@pytest.mark.parametrize("model", [Chain(8, 8, 8, 8, tells=True), Chain(8, 8, 4, 4)], ids=["a number", "a width"])
def test_all_blocks_are_run_where_one_takes_more_than_hidden_states_from_another(model, generator):
    data = [{"input_ids": part} for part in torch.randint(8, (6, 5), generator=generator).split(2)]
    expected, calls = block_inputs(model, model.blocks, data), counted(model.blocks[1])
    assert_same_inputs(first_inputs(model, model.blocks, data, []), expected)
    # and once for the one sequence that showed it
    assert len(calls) == 1 + len(data)


@torch.no_grad()
def test_layers_with_one_input_are_found_in_the_order_of_calls(make_model, kind, ids):
    model = make_model(kind)
    _, blocks = find_blocks(model)
    inputs = block_inputs(model, blocks, batches(ids))[0]
    found = linears(blocks[0], "block")
    found["block.never"] = nn.Linear(2, 2)
    groups = shared_inputs(found, partial(inputs.run, 0, blocks[0]))
    assert [[name.split(".")[-1] for name in names] for names, _ in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
        ["never"],
    ]
    assert [calls for _, calls in groups] == [1, 1, 1, 1, 0]


@torch.no_grad()
def test_moments_are_those_of_all_inputs_and_the_rest_of_the_block_is_not_run(make_model, ids):
    model = make_model()
    _, blocks = find_blocks(model)
    running = block_inputs(model, blocks, [{"input_ids": part} for part in ids.split(5)])
    passes = [(partial(inputs.run, 0, blocks[0]), inputs.mask) for inputs in running]
    seen, later = [], []
    attention, mlp = blocks[0].self_attn, blocks[0].mlp
    handle = attention.o_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    model(ids)
    handle.remove()
    handle = mlp.register_forward_pre_hook(lambda *_: later.append(1))
    moments = second_moments(attention.o_proj, 1, passes)
    assert later == []
    torch.testing.assert_close(moments.sum, torch.cat(seen).double().T @ torch.cat(seen).double(), rtol=1e-5, atol=1e-5)
    assert moments.count == ids.numel()
    # a layer that is called twice is heard twice
    assert second_moments(
        mlp.gate_proj, 2, [(lambda: (mlp.gate_proj(seen[0]), mlp.gate_proj(seen[0])), None)]
    ).count == (2 * len(seen[0]))


@torch.no_grad()
def test_padding_is_left_out(make_model, kind, ids):
    """Sequences padded to one length have the moments that they have alone."""
    model = make_model(kind)
    _, blocks = find_blocks(model)
    lengths = [32, 20, 7]
    alone = [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths)]
    mask = torch.arange(32) < torch.tensor(lengths)[:, None]
    padded = [{"input_ids": ids[:3].masked_fill(~mask, 2), "attention_mask": mask.long()}]
    assert sum(map(num_tokens, padded)) == sum(lengths)
    for layer in (blocks[1].self_attn.q_proj, blocks[1].mlp.down_proj):
        found = []
        for data in (alone, padded):
            running = block_inputs(model, blocks, data)
            for inputs in running:
                inputs.hidden = inputs.run(0, blocks[0])
            passes = [(partial(inputs.run, 1, blocks[1]), inputs.mask) for inputs in running]
            found.append(second_moments(layer, 1, passes))
        assert found[0].count == found[1].count == sum(lengths)
        # sums over other shapes are rounded otherwise
        torch.testing.assert_close(found[0].mean, found[1].mean, rtol=1e-4, atol=1e-4)
