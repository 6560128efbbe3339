"""Axis allocation, on models: what losses and costs say, what allocators promise, and files."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.allocation import (
    DynamicProgram,
    Evolution,
    Greedy,
    IntegerProgram,
    LayerDivergence,
    Linearity,
    MaskSensitivity,
    MeasuredCost,
    MixedGrids,
    OutputError,
    RelativeError,
    StoredBits,
    load,
    save,
)
from tersor.quant.allocation.candidates import candidates_of
from tersor.quant.allocation.divergence import swapped
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import relative_error
from tersor.quant.teacher import Teacher
from tersor.quant.transform import Hadamard, RotateHeads, RotateResidual

GRIDS = [IntGrid(bits, 32) for bits in (4, 2, 3)]
RTN, GPTQ = recipes.rtn(4, 32), recipes.gptq(4, 32)
LOSSES = [
    RelativeError(),
    OutputError(),
    LayerDivergence(tokens=64),
    Linearity(2, tokens=64),
    MaskSensitivity(repeats=2, tokens=64),
]
EVOLUTION = Evolution(generations=3, offspring=4, survivors=(2, 1), tokens=(64, 128), initial=4)
ALLOCATORS = [
    Greedy(OutputError()),
    DynamicProgram(RelativeError()),
    IntegerProgram(),
    EVOLUTION,
    replace(EVOLUTION, moves="any"),
]


def named(piece) -> str:
    return type(piece).__name__


every_loss = pytest.mark.parametrize("loss", LOSSES, ids=named)
every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS, ids=named)


def losses(loss, model, recipe, ids, grids=tuple(GRIDS), keep=()):
    with torch.no_grad(), candidates_of(model, grids, recipe, ids, keep) as candidates:
        return loss.losses(candidates)


def average_bits(model: nn.Module) -> float:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return 8 * sum(layer.nbytes for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)


@every_loss
@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_every_layer_loses_more_at_fewer_bits(loss, recipe, make_model, ids):
    table = losses(loss, make_model(), recipe, ids)
    assert len(table) == 2 * 7
    for four, two, three in table.values():
        assert 0 < four < three < two


@every_loss
def test_looking_at_a_model_leaves_it_as_it_was(loss, make_model, ids):
    model = make_model().train()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    losses(loss, model, GPTQ, ids)
    assert model.training
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), parameter.requires_grad) == (before[name][0], True)
        assert torch.equal(parameter, before[name][1])


@every_loss
def test_the_same_loss_twice(loss, make_model, ids):
    assert losses(loss, make_model(), RTN, ids) == losses(loss, make_model(), RTN, ids)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != OutputError()], ids=named)
def test_without_data_losses_come_from_weights_or_random_tokens(loss, make_model):
    assert all(min(of_layer) > 0 for of_layer in losses(loss, make_model(), RTN, None).values())


def test_random_text_is_of_the_embeddings_tokens(make_model):
    """Configs of models that also see have no vocab_size."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"}
    text = make_model("gemma3").config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    assert not hasattr(config, "vocab_size")
    model = Gemma3ForConditionalGeneration(config).eval()
    grids = [IntGrid(bits, 16) for bits in (2, 4)]
    found = DynamicProgram(LayerDivergence(tokens=256)).allocate(
        model, grids, recipes.rtn(4, 16), None, 3.5, keep=["vision_tower", "multi_modal_projector"]
    )
    assert set(found.values()) <= set(grids)


def test_output_errors_need_data(make_model):
    with pytest.raises(ValueError, match="give calibration"):
        losses(OutputError(), make_model(), RTN, None)


def test_the_relative_error_is_that_of_rounded_weights(make_model, ids):
    model = make_model()
    quantised = quantize(make_model(), RTN)
    for name, (four, *_) in losses(RelativeError(), model, GPTQ, ids).items():
        assert four == pytest.approx(quantised.get_submodule(name).relative_error, rel=1e-6)


def test_the_output_error_is_what_the_layer_puts_out(make_model, ids):
    """Of the first layers, as all others have inputs from dense layers here, and from quantised ones in the walk."""
    model, name = make_model(), "model.layers.0.self_attn.q_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x, weight = seen[0].flatten(0, 1), model.get_submodule(name).weight.detach()
    layer = quantize(make_model(), GPTQ, ids).get_submodule(name)
    expected = ((x @ (layer.dequantize() - weight).T) ** 2).sum(-1).mean()
    assert losses(OutputError(), model, GPTQ, ids)[name][0] == pytest.approx(float(expected), rel=1e-3)


@torch.no_grad()
def test_the_layers_divergence_is_the_models_with_that_layer_rounded(make_model, ids):
    model, name = make_model(), "model.layers.1.mlp.up_proj"
    found = losses(LayerDivergence(tokens=10**6, top_k=None), model, RTN, ids)[name]
    dense = model(ids).logits.double().log_softmax(-1)
    keep = [other for other in losses(RelativeError(), model, RTN, None) if other != name]
    for grid, loss in zip(GRIDS, found):
        log_q = quantize(make_model(), replace(RTN, grid=grid), keep=keep)(ids).logits.double().log_softmax(-1)
        # 1e-8: of logarithms in float32, over 512 tokens
        assert loss == pytest.approx(float((dense.exp() * (dense - log_q)).sum(-1).mean()), rel=1e-3, abs=1e-8)


ROTATED = replace(RTN, transforms=(RotateResidual(), RotateHeads(), Hadamard(layers=("down_proj",))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "same"),
    [(RTN, ""), (ROTATED, ""), (GPTQ, "layers.0.self_attn.q"), (recipes.eora(3, 32, 4), "layers.0.self_attn.q")],
    ids=["rtn", "rotated", "gptq", "eora"],
)
def test_what_layers_become_is_what_the_walk_makes_of_them(recipe, same, make_model, ids):
    """If they are fitted to their inputs, only the first ones: all others have inputs from dense layers here."""
    walked = quantize(make_model(), replace(recipe, grid=GRIDS[1]), ids)
    with candidates_of(make_model(), GRIDS[1:2], recipe, ids, ()) as candidates:
        for name, _, (weight,), _ in candidates.compressed(candidates.recipe):
            if same in name:
                assert torch.equal(weight, walked.get_submodule(name).dequantize())


@torch.no_grad()
@pytest.mark.parametrize(
    "recipe", [ROTATED, recipes.smoothquant(), recipes.smoothquant_plus(3, 32)], ids=["rotated", "smooth", "searched"]
)
def test_transforms_fold_into_a_copy_that_computes_the_same(recipe, make_model, ids):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with candidates_of(model, GRIDS, recipe, ids, ()) as candidates:
        torch.testing.assert_close(candidates.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert candidates.model is not model
        table = RelativeError().losses(candidates)
    assert all(0 < four < three < two for four, two, three in table.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_kept_tokens_see_no_more_than_all_of_them(make_model, ids):
    model = make_model()
    rows = [{"input_ids": row[None]} for row in ids]
    weight = model.model.layers[0].mlp.up_proj.weight
    found = {}
    for top_k in (1, 8, 64, None):
        teacher = Teacher(model, rows, top_k)
        # 1e-6: what float32 knows of a sum of probabilities
        assert abs(teacher.divergence()) < 1e-6
        with swapped({weight: weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))}):
            found[top_k] = teacher.divergence()
    assert 0 < found[1] < found[8] < found[64] < found[None]


@torch.no_grad()
def test_padding_does_not_count(make_model, ids):
    model = make_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    padded = nn.functional.pad(ids, (0, 5), value=2)
    mask = nn.functional.pad(torch.ones_like(ids), (0, 5))
    found = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(ids))]
        teacher = Teacher(model, rows)
        assert teacher.num_tokens == [32] * 16
        with swapped({weight: weight * 0.9}):
            found.append(teacher.divergence())
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_swapped_weights_come_back_after_an_error():
    linear = nn.Linear(2, 2)
    before = linear.weight.clone()
    with pytest.raises(RuntimeError, match="shapes"), swapped({linear.weight: torch.zeros(2, 2)}):
        linear(torch.zeros(3))
    assert torch.equal(linear.weight, before)


def test_the_slope_of_a_quadratic_is_its_constant():
    """A divergence that is c ||W - W_0||^2 / ||W_0||^2."""
    parameter = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    before = parameter.detach().clone()
    alphas = Linearity().alphas({"": parameter}, lambda: 3 * relative_error(before, parameter.data, None))
    # 4096 normal draws: their squares sum to 4096 +- 90, and 15 levels even that out
    assert alphas[""] == pytest.approx(3, rel=0.02)


def test_masks_keep_the_share_that_they_say():
    parameter = nn.Parameter(torch.ones(64, 64))
    for ratio in (0.25, 0.75):
        piece = MaskSensitivity(ratio)
        share = piece.sensitivities({"": parameter}, lambda: float(parameter.data.mean()))[""]
        assert share == pytest.approx(ratio, abs=0.02)


@every_allocator
@pytest.mark.parametrize("budget", [3.5, 4.17, 4.75, 9.0])
def test_no_allocator_spends_more_than_the_budget(allocator, budget, make_model, ids):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    allocation = allocator.allocate(model, GRIDS, RTN, ids, budget)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantize(model, RTN, allocation=allocation)
    assert average_bits(model) <= budget
    # what is left would not raise the smallest layer (32 x 64 of 73,728 weights) by a bit
    assert average_bits(model) > min(budget, 4.4) - 0.5
    assert set(allocation.values()) <= set(GRIDS)
    assert len(allocation) == 2 * 7


@every_allocator
def test_a_grids_own_bits_buy_that_grid_for_all(allocator, make_model, ids):
    """Even as a quotient of bits and weights, which rounding may have made smaller."""
    model = make_model()
    grids = [IntGrid(2, 32), IntGrid(3, 32)]
    budget = average_bits(quantize(make_model(), recipes.rtn(2, 32)))
    assert set(allocator.allocate(model, grids, RTN, ids, budget).values()) == {grids[0]}


@every_allocator
def test_too_small_a_budget_is_named_with_the_least(allocator, make_model, ids):
    with pytest.raises(ValueError, match=r"budget = 1.5 bits per weight is too small: the cheapest grids take 2\.\d+"):
        allocator.allocate(make_model(), GRIDS, RTN, ids, 1.5)


def test_bits_are_counted_as_they_are_stored(make_model):
    model = make_model()
    with candidates_of(model, GRIDS, RTN, None, ()) as candidates:
        costs = StoredBits().costs(candidates)
        weights = StoredBits().scale(candidates)
    for index, grid in enumerate(GRIDS):
        stored = quantize(make_model(), replace(RTN, grid=grid))
        assert sum(of_layer[index] for of_layer in costs.values()) == weights * average_bits(stored)
        for name, of_layer in costs.items():
            assert of_layer[index] == 8 * stored.get_submodule(name).nbytes


def test_what_is_kept_is_not_allocated(make_model):
    allocation = Greedy().allocate(make_model(), GRIDS, RTN, None, 4, keep=["down_proj", "layers.0.self_attn"])
    assert len(allocation) == 2 * 7 - 2 - 4
    assert not any("down_proj" in name for name in allocation)


def test_what_does_not_suit_a_layer_is_named_before_any_work(make_model):
    with pytest.raises(ValueError, match="down_proj: in = 96 is not a multiple of group_size = 64"):
        Evolution().allocate(make_model(), [IntGrid(2, 64)], RTN, None, 3)
    with pytest.raises(ValueError, match="at least one grid"):
        Greedy().allocate(make_model(), [], RTN, None, 3)
    with pytest.raises(ValueError, match="give calibration"):
        Greedy().allocate(make_model(), GRIDS, GPTQ, None, 3)


@pytest.mark.parametrize(
    ("piece", "settings", "said"),
    [
        (Linearity, {"levels": 0}, "levels must be positive, got 0"),
        (Linearity, {"largest": 0.0}, "largest must be positive, got 0.0"),
        (MaskSensitivity, {"ratio": 1.0}, "ratio must be between 0 and 1, got 1.0"),
        (MaskSensitivity, {"repeats": 0}, "repeats must be positive, got 0"),
        (MeasuredCost, {"tokens": 0}, "must be positive, got 0 and 50"),
    ],
)
def test_settings_that_make_no_sense_are_named(piece, settings, said):
    with pytest.raises(ValueError, match=said):
        piece(**settings)


def test_latencies_are_measured_once_for_each_shape_and_grid(make_model):
    with candidates_of(make_model(), GRIDS, RTN, None, ()) as candidates:
        costs = MeasuredCost(repeats=3).costs(candidates)
    assert all(microseconds > 0 for of_layer in costs.values() for microseconds in of_layer)
    # q and o; k and v; gate and up; down: (64, 64), (32, 64), (96, 64), (64, 96)
    assert len({tuple(of_layer) for of_layer in costs.values()}) == 4
    assert costs["model.layers.0.self_attn.q_proj"] == costs["model.layers.1.self_attn.o_proj"]


def test_latencies_measured_are_within_the_budget(make_model, ids, monkeypatch):
    """OHQ: mask sensitivity times error, in microseconds, by an integer program."""
    allocator = IntegerProgram(MaskSensitivity(repeats=1, tokens=64), MeasuredCost(repeats=3))
    model = make_model()
    with candidates_of(model, GRIDS, RTN, ids, ()) as candidates:
        costs = allocator.cost.costs(candidates)
    # measured again they would be others
    monkeypatch.setattr(MeasuredCost, "costs", lambda self, candidates: costs)
    least, most = (sum(map(choose, costs.values())) for choose in (min, max))
    for budget in (least, (least + most) / 2, most):
        allocation = allocator.allocate(model, GRIDS, RTN, ids, budget)
        # 2^-40: the slack that a rounded budget has
        assert sum(costs[name][GRIDS.index(grid)] for name, grid in allocation.items()) <= budget * (1 + 2**-39)
    with pytest.raises(ValueError, match="µs is too small"):
        allocator.allocate(model, GRIDS, RTN, ids, least / 2)


def test_an_allocation_comes_back_from_its_file(tmp_path, make_model):
    allocation = Greedy().allocate(make_model(), [*GRIDS, IntGrid(3, None, symmetric=True)], RTN, None, 3.6)
    save(allocation, tmp_path / "allocation.json")
    assert load(tmp_path / "allocation.json") == allocation


@pytest.mark.parametrize("settings", ['{"type": "FutureGrid"}', '{"type": "IntGrid", "shape": 3}', "{}"])
def test_a_file_with_unknown_grids_is_named(settings, tmp_path):
    (tmp_path / "allocation.json").write_text(f'{{"layers.0.up_proj": {settings}}}')
    with pytest.raises(ValueError, match="allocation.json: layers.0.up_proj has"):
        load(tmp_path / "allocation.json")


@pytest.mark.parametrize("allocator", [Greedy(), Greedy(cost=MeasuredCost(repeats=3))], ids=["bits", "time"])
def test_mixed_grids_cost_no_more_than_the_recipes_grid(allocator, make_model, ids):
    grids = tuple(IntGrid(bits, 32) for bits in (2, 4))
    recipe = Recipe(IntGrid(3, 32), allocation=MixedGrids(grids, allocator))
    model = quantize(make_model(), recipe)
    uniform = quantize(make_model(), replace(recipe, allocation=None))
    chosen = {name: m.scheme.grid for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(chosen.values()) <= set(grids)
    if allocator == Greedy():
        assert set(chosen.values()) == set(grids)
        assert 0.9 * nbytes(uniform) <= nbytes(model) <= nbytes(uniform)


def test_an_allocation_that_is_given_is_not_searched_again(make_model):
    class Never:
        cost = StoredBits()

        def allocate(self, *_, **__):
            raise AssertionError

    recipe = Recipe(IntGrid(3, 32), allocation=MixedGrids((IntGrid(2, 32),), Never()))
    quantize(make_model(), recipe, allocation={})
    with pytest.raises(AssertionError):
        quantize(make_model(), recipe)


def nbytes(model) -> int:
    return sum(layer.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
