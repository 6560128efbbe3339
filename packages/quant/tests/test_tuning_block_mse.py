"""Block-wise reconstruction: what it lowers, and what it leaves alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.quant import Recipe, quantize
from tersor.quant.activation import IntActivation
from tersor.quant.calibration import BlockInputs, block_inputs
from tersor.quant.compensation import LowRank
from tersor.quant.grid import AdditiveGrid, FloatGrid, GaussianPairGrid, IntGrid, KMeansGrid, NVFP4Grid, SeedGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ
from tersor.quant.tuning import BlockMSE, BlockReconstruction, LearnedClip, trainable

GRIDS = [
    IntGrid(3, 32),
    IntGrid(2, None, symmetric=True),
    IntGrid(3, 32, float_zero=True),
    KMeansGrid(2),
    FloatGrid("e2m1", 16),
    GaussianPairGrid(16, 32),
    AdditiveGrid(2, 4),
]
SHORT = BlockMSE(steps=20)


class Tuned:
    """A model whose second block is quantised, and what that one is called with."""

    def __init__(self, make_model, ids: Tensor, grid, kind: str = "llama", dtype=torch.float32) -> None:
        self.model = make_model(kind, dtype)
        self.original = copy.deepcopy(self.model.model.layers[1])
        batches = [{"input_ids": part} for part in ids.split(4)]
        self.dense = block_inputs(self.model, self.model.model.layers, batches)
        for each in self.dense:
            each.hidden = each.run(0, self.model.model.layers[0]).detach()
        quantize(self.model, Recipe(grid), keep=["layers.0"])
        self.block = self.model.model.layers[1]
        noise = torch.Generator().manual_seed(1)
        # what quantised blocks before it would have put out
        self.inputs = [
            replace(each, hidden=each.hidden * (1 + 0.1 * torch.randn(each.hidden.shape, generator=noise)).to(dtype))
            for each in self.dense
        ]

    @torch.no_grad()
    def error(self, inputs: list[BlockInputs], targets: list[BlockInputs]) -> float:
        """Mean over the batches of the relative squared error of the block's outputs."""
        total = 0.0
        for given, target in zip(inputs, targets):
            y = target.run(1, self.original).float()
            total += float((given.run(1, self.block).float() - y).square().sum() / y.square().sum())
        return total / len(inputs)

    @torch.no_grad()
    def tune(self, tuning: BlockMSE) -> "Tuned":
        tuning.tune_block(self.block, self.original, self.inputs, self.dense, 1)
        return self


@pytest.mark.parametrize(
    ("grid", "target"), [*((grid, "dense") for grid in GRIDS), (GRIDS[0], "inputs"), (GRIDS[0], "both")], ids=str
)
def test_the_error_that_it_was_given_falls_and_the_codes_stay(grid, target, make_model, ids):
    tuned = Tuned(make_model, ids, grid)
    targets = {"inputs": [tuned.inputs], "dense": [tuned.dense], "both": [tuned.inputs, tuned.dense]}[target]
    codes = {
        name: m.stored()["codes"].clone() for name, m in tuned.block.named_modules() if isinstance(m, QuantizedLinear)
    }
    before = sum(tuned.error(tuned.inputs, each) for each in targets)
    tuned.tune(replace(SHORT, target=target))
    assert sum(tuned.error(tuned.inputs, each) for each in targets) < 0.98 * before
    assert all(torch.equal(tuned.block.get_submodule(name).codes, own) for name, own in codes.items())


def test_a_rate_that_is_much_too_high_changes_nothing(make_model, ids):
    tuned = Tuned(make_model, ids, IntGrid(3, 32))
    before = {name: tensor.clone() for name, tensor in tuned.block.state_dict().items()}
    tuned.tune(replace(SHORT, rate=100.0))
    after = tuned.block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_rates_are_those_of_the_first_pattern_that_fits(make_model, ids):
    """At rate 0 a parameter stays; all others move."""
    tuned = Tuned(make_model, ids, IntGrid(3, 32))
    before = {name: tensor.clone() for name, tensor in tuned.block.state_dict().items()}
    tuned.tune(replace(SHORT, rates=(("q_proj.scale", 0.0), ("self_attn", 1e-3), ("*norm", 0.0))))
    moved = {name for name, tensor in tuned.block.state_dict().items() if not torch.equal(before[name], tensor)}
    scales = {f"{name}.scale_bits" for name, m in tuned.block.named_modules() if isinstance(m, QuantizedLinear)}
    assert moved == scales - {"self_attn.q_proj.scale_bits"}


def test_norms_and_biases_are_learnt_only_if_named(make_model, ids):
    for also in ((), ("*norm",), ("*norm", "bias")):
        tuned = Tuned(make_model, ids, IntGrid(3, 32), "qwen2")
        before = {name: tensor.clone() for name, tensor in tuned.block.state_dict().items()}
        tuned.tune(replace(SHORT, also=also))
        moved = {name for name, tensor in tuned.block.state_dict().items() if not torch.equal(before[name], tensor)}
        assert any("norm" in name for name in moved) == ("*norm" in also)
        # the outputs do not depend on that of k: softmax takes no notice of what all logits share
        assert ("self_attn.q_proj.bias" in moved) == ("self_attn.v_proj.bias" in moved) == ("bias" in also)


def test_small_steps_are_not_lost_in_bfloat16(make_model, ids):
    """2e-3 of a norm's weight is below half a step of bfloat16: only their sum moves it."""
    tuned = Tuned(make_model, ids, IntGrid(2, 32), dtype=torch.bfloat16)
    before = tuned.error(tuned.inputs, tuned.dense)
    norm = tuned.block.input_layernorm.weight.detach().clone()
    tuned.tune(replace(SHORT, steps=40, rate=1e-3, rates=(("*_proj", 0.0),)))
    assert not torch.equal(tuned.block.input_layernorm.weight, norm)
    assert tuned.error(tuned.inputs, tuned.dense) < before
    assert tuned.block.input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tuning", [SHORT, BlockReconstruction(steps=60), LearnedClip(steps=20)], ids=lambda t: type(t).__name__
)
def test_float16_learns_as_much_as_float32(tuning, make_model, ids):
    """Of an error over all outputs, that of one is less than what float16 holds."""
    gains = []
    for dtype in (torch.float32, torch.float16):
        model = make_model("llama", dtype)
        # as large as in the later blocks of models of billions
        model.model.embed_tokens.weight.data *= 100
        exact, batches = copy.deepcopy(model), list(ids.split(4))
        losses = []
        for tunings in ((), (tuning,)):
            quantised = quantize(copy.deepcopy(model), Recipe(IntGrid(2, 32), tuning=tunings), batches)
            difference = block_outputs(quantised, ids) - block_outputs(exact, ids)
            losses.append(float(difference.float().square().sum()))
        gains.append(losses[1] / losses[0])
    assert gains[0] < 0.98
    assert 1 - gains[1] > 0.8 * (1 - gains[0])


@torch.no_grad()
def block_outputs(model, ids) -> Tensor:
    return model(ids, output_hidden_states=True).hidden_states[-2]


def test_what_is_trained_is_what_will_run(make_model, ids):
    """What makes up for the weight's error is given the inputs as they are, the weight those that are rounded."""
    grid, pieces = IntGrid(2, 32), {"activation": IntActivation(4), "compensation": LowRank(16)}
    model = quantize(make_model(), Recipe(grid, GPTQ(), **pieces), ids)
    with torch.no_grad():
        expected = model(ids).logits
        with trainable(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_biases_of_linears_that_are_kept_stay_and_all_remain_as_trainable_as_they_were(make_model, ids):
    for tuning in (SHORT, LearnedClip(steps=2)):
        model = make_model("qwen2")
        before = copy.deepcopy(model.model.layers[1].self_attn.q_proj)
        wanted = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")}
        assert wanted
        quantize(model, Recipe(IntGrid(2, 32), tuning=(tuning,)), ids, keep=["layers.1.self_attn"])
        kept = model.model.layers[1].self_attn.q_proj
        assert torch.equal(kept.bias, before.bias)
        assert torch.equal(kept.weight, before.weight)
        assert {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")} == wanted


def test_a_block_that_is_kept_whole_may_still_learn_its_norms(make_model, ids):
    model, tuning = make_model(), BlockReconstruction(steps=3, warm_up=0.0, also=("*norm",))
    quantize(model, Recipe(IntGrid(3, 32), tuning=(tuning,)), ids, keep=["layers.1"])


def test_the_seed_alone_decides(make_model, ids):
    states = [Tuned(make_model, ids, IntGrid(3, 32)).tune(replace(SHORT, seed=seed)) for seed in (0, 0, 1)]
    scales = [each.block.self_attn.q_proj.scale_bits for each in states]
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])


@pytest.mark.parametrize("grid", [SeedGrid(8, 3, 8), NVFP4Grid()], ids=str)
def test_grids_without_continuous_parts_or_with_rounded_ones_are_never_worse_off(grid, make_model, ids):
    tuned = Tuned(make_model, ids[:4], grid)
    before = tuned.error(tuned.inputs, tuned.dense)
    tuned.tune(replace(SHORT, also=()))
    assert tuned.error(tuned.inputs, tuned.dense) <= before


def test_the_walk_tunes_every_block_and_the_model_stays_as_trainable_as_it_was(make_model, ids):
    """Each block against the dense path: what the blocks before it lost, it mends."""
    found = {}
    for name, tuning in {"none": (), "tuned": (SHORT,)}.items():
        model = make_model()
        with torch.no_grad():
            expected = model(ids).logits
        grads = {name: p.requires_grad for name, p in model.named_parameters() if "proj" not in name}
        quantize(model, Recipe(IntGrid(3, 32), tuning=tuning), ids)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
        with torch.no_grad():
            found[name] = float((model(ids).logits - expected).square().mean())
    assert found["tuned"] < 0.9 * found["none"]


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rate": 0.0}, {"target": "outputs"}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BlockMSE(**settings)
