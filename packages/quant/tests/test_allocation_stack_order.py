"""StackOrder: the best block first, level by level."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.quant import quantize, recipes
from tersor.quant.allocation import StackOrder
from tersor.quant.allocation.stack_order import ordered
from tersor.quant.elastic import stacks, with_blocks
from tersor.quant.teacher import Teacher

NAN = float("nan")
KEEP = ["layers.0", "self_attn"]


@pytest.fixture
def stacked(make_model, ids):
    return quantize(make_model(), recipes.bitstack(3, 4), ids, keep=KEEP)


def test_every_block_but_the_first_is_named_once_level_by_level(stacked, ids):
    before = stacked.state_dict()
    order, names = StackOrder().order(stacked, ids[:4]), set(stacks(stacked))
    assert [set(order[:3]), set(order[3:])] == [names, names]
    assert Counter(order) == dict.fromkeys(names, 2)
    after = stacked.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


@torch.no_grad()
def test_levels_are_in_the_order_of_what_the_model_loses(stacked, ids):
    rows = [{"input_ids": row[None]} for row in ids[:4]]
    teacher, layers = Teacher(stacked, rows, None), stacks(stacked)
    order = StackOrder(top_k=None).order(stacked, ids[:4])
    for level in (1, 2):
        losses = {}
        for raised in layers:
            for name, layer in layers.items():
                stacked.set_submodule(name, with_blocks(layer, level + (name == raised)))
            losses[raised] = teacher.divergence()
        assert order[3 * (level - 1) : 3 * level] == sorted(losses, key=losses.__getitem__)


@given(st.lists(st.lists(st.floats(0, 1) | st.just(NAN), min_size=4, max_size=4), min_size=1, max_size=5))
def test_levels_stay_apart_and_what_is_no_number_comes_last_as_in_the_next(losses):
    names = "qkvo"
    order = ordered([dict(zip(names, of_level)) for of_level in losses])
    levels = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert all(sorted(level) == sorted(names) for level in levels)
    for i, (level, of_level) in enumerate(zip(levels, losses)):
        known = [name for name in level if of_level[names.index(name)] == of_level[names.index(name)]]
        assert level[: len(known)] == known
        values = [of_level[names.index(name)] for name in known]
        assert values == sorted(values)
        unknown = level[len(known) :]
        following = levels[i + 1] if i + 1 < len(levels) else list(names)
        ties = i + 1 < len(levels) and len(set(losses[i + 1])) < 4
        assert ties or unknown == [name for name in following if name in unknown]


def test_layers_with_fewer_blocks_end_earlier():
    assert ordered([{"q": 0.2, "k": 0.1}, {"q": 0.1}]) == ["k", "q", "q"]
    assert ordered([{"q": NAN, "k": NAN, "v": 0.5}, {"k": 0.1}]) == ["v", "q", "k", "k"]


def test_models_without_stacks_are_refused(make_model, ids):
    with pytest.raises(ValueError, match="is a SignLowRankStack; quantise with recipes.bitstack"):
        StackOrder().order(make_model(), ids)
