"""Orders of channels: the model stays the same, and outliers come first."""

import copy

import pytest
import torch

from tersor.quant import Recipe, quantize
from tersor.quant.calibration import batches, block_inputs
from tersor.quant.grid import IntGrid
from tersor.quant.transform import (
    BlockTransform,
    CalibratedTransform,
    PermuteIntermediate,
    PermuteResidual,
    UnsupportedFold,
)

GRID = IntGrid(4, 32)


def fold_blocks(model, ids) -> None:
    inputs = block_inputs(model, model.model.layers, batches(ids))
    for index, block in enumerate(model.model.layers):
        PermuteIntermediate().check_block(block, inputs, index)
        PermuteIntermediate().fold_block(block, inputs, index, {})
        for each in inputs:
            each.hidden = each.run(index, block)


@pytest.mark.parametrize("where", ["residual", "intermediate", "both"])
@torch.no_grad()
def test_the_model_stays_the_same_but_for_the_order_of_sums(where, make_model, kind, ids, in_double):
    model = in_double(make_model(kind))
    before, expected = copy.deepcopy(model.state_dict()), model(ids).logits
    if where != "intermediate":
        PermuteResidual().fold_calibrated(model, batches(ids))
    if where != "residual":
        fold_blocks(model, ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
    moved = 0
    for name, parameter in model.state_dict().items():
        moved += not torch.equal(parameter, before[name])
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values), name
    assert moved


@torch.no_grad()
def test_outliers_of_the_stream_come_first_for_all_who_read_it(make_model, kind, ids):
    model = make_model(kind)
    outliers = [5, 33, 50]
    for block in model.model.layers:
        norm = block.input_layernorm
        norm.weight.data[outliers] = 100
    PermuteResidual().fold_calibrated(model, batches(ids))
    for block in model.model.layers:
        assert (block.input_layernorm.weight[:3] == 100).all()
        assert (block.input_layernorm.weight[3:] < 100).all()


@torch.no_grad()
def test_channels_between_projections_fall_in_size(make_model, kind, ids):
    model = make_model(kind)
    fold_blocks(model, ids)
    seen = []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(ids)
    for x in seen:
        maxima = x.abs().amax((0, 1))
        assert (maxima.diff() <= 0).all()


@torch.no_grad()
def test_heads_stay_where_they_are(make_model, kind, ids):
    model = make_model(kind)
    before = {name: p.clone() for name, p in model.named_parameters() if "self_attn" in name}
    fold_blocks(model, ids)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@torch.no_grad()
def test_the_tied_head_stays_tied(make_model, ids):
    model = make_model("gemma3")
    PermuteResidual().fold_calibrated(model, batches(ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_in_which_channels_have_numbers_is_refused_as_it_was(make_model, ids):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    for block in model.model.layers:
        block.register_forward_hook(lambda module, arguments, output: output + torch.arange(64))
        block.mlp.down_proj.register_forward_pre_hook(lambda module, arguments: (arguments[0] + torch.arange(96),))
    for transform in (PermuteResidual(), PermuteIntermediate()):
        with pytest.raises(UnsupportedFold, match=f"leave {type(transform).__name__}"):
            quantize(model, Recipe(GRID, transforms=(transform,)), ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_they_are_transforms_and_need_data(make_model):
    assert isinstance(PermuteResidual(), CalibratedTransform)
    assert isinstance(PermuteIntermediate(), BlockTransform)
    for transform in (PermuteResidual(), PermuteIntermediate()):
        with pytest.raises(ValueError, match="learns from data"):
            quantize(make_model(), Recipe(GRID, transforms=(transform,)))
