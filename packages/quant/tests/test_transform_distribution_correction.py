"""Distribution correction: what it folds is what it has learnt on, never worse than where it starts from."""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import PlaneActivation
from tersor.quant.blocks import find_blocks, linears
from tersor.quant.calibration import block_inputs
from tersor.quant.grid import BitBalance, GaussianPairGrid, IntGrid, NormalFloatGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.transform import DistributionCorrection, TaughtTransform
from tersor.quant.transform.attention import attentions, divergence
from tersor.quant.transform.distribution_correction import _Layer

LENGTH = 128
FOUR_BITS = IntGrid(4, 32)


class Exact:
    """A grid of all numbers: nothing is rounded."""

    per_row = True
    group_size = None

    def groups(self, in_features: int) -> int:
        return 1

    def check(self, out_features: int, in_features: int) -> None: ...

    def whole(self):
        return self

    def fit(self, weight: Tensor) -> tuple:
        return ()

    def refit(self, weight: Tensor, params: tuple) -> tuple:
        return ()

    def encode(self, weight: Tensor, params: tuple) -> Tensor:
        return weight

    def decode(self, codes: Tensor, params: tuple) -> Tensor:
        return codes

    layout = pack = unpack = prepare = linear = check


@torch.no_grad()
def folded(model, ids: Tensor, correction: DistributionCorrection, grid) -> float:
    """Fold the first block; relative change of what it puts out, unrounded."""
    block = find_blocks(model)[1][0]
    inputs = block_inputs(model, [block], [{"input_ids": ids}])
    before, original = inputs[0].run(0, block), copy.deepcopy(block)
    grids = dict.fromkeys(linears(block).values(), grid)
    correction.check_block(block, inputs, 0)
    correction.fold_taught(block, original, inputs, inputs, 0, grids)
    assert all(p.requires_grad for p in block.parameters())
    return float((inputs[0].run(0, block) - before).norm() / before.norm())


def test_without_rounding_nothing_changes(make_model, in_double, kind, ids):
    """W16A16: smoothing is folded and cancels, the rank-one change stays at zero."""
    model = in_double(make_model(kind))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert folded(model, ids, DistributionCorrection(epochs=2, clip_rate=0), Exact()) < 1e-9
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    # it did fold something: where there is a norm before q, k and v, it has another weight
    assert any("layers.0" in name for name in changed)
    assert not any("layers.1" in name for name in changed)


def test_the_walk_rounds_what_was_learnt_on(make_model, ids):
    """Rounded to nearest, the folded weights are those that the loss has seen."""
    seen: dict[str, Tensor] = {}
    fold = DistributionCorrection._learn

    def learn(self, layers, *arguments):
        fold(self, layers, *arguments)
        with torch.no_grad():
            for name, layer in layers.items():
                s = 1.0 if layer.log_scale is None else layer.log_scale.exp()[layer.channel_of]
                seen[name] = layer.rounded(layer.moved() * s) / s

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributionCorrection, "_learn", learn)
        model = make_model()
        recipe = Recipe(FOUR_BITS, transforms=(DistributionCorrection(PlaneActivation(8), epochs=3),))
        model = quantize(model, recipe, ids, keep=["layers.1"])
    block = model.model.layers[0]
    # what a reader's columns were multiplied with, and a source's rows divided by, is undone by what is next to them
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        norm = "input_layernorm" if "attn" in name else "post_attention_layernorm"
        original = make_model().model.layers[0].get_submodule(norm).weight
        s = original / block.get_submodule(norm).weight
        torch.testing.assert_close(block.get_submodule(name).dequantize() / s, seen[name], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("grid", [FOUR_BITS, IntGrid(2, None), BitBalance(5, 32), NormalFloatGrid(32)], ids=str)
def test_the_loss_is_never_above_that_at_the_start(grid, make_model, ids):
    losses: list[float] = []
    learn = DistributionCorrection._learn

    def watched(self, layers, loss, inputs, index):
        with torch.no_grad():
            losses.append(float(sum(loss(batch) for batch in range(len(inputs)))))
            learn(self, layers, loss, inputs, index)
            losses.append(float(sum(loss(batch) for batch in range(len(inputs)))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributionCorrection, "_learn", watched)
        folded(make_model(), ids, DistributionCorrection(PlaneActivation(8), epochs=4), grid)
    before, after = losses
    assert after < before


def test_rates_of_zero_leave_smoothquant(make_model, ids):
    still = DistributionCorrection(epochs=1, smoothing_rate=0, clip_rate=0, compensation_rate=0)
    corrected, smoothed = (
        quantize(make_model(), Recipe(FOUR_BITS, transforms=(transform,)), ids)
        for transform in (still, recipes.smoothquant().transforms[0])
    )
    for name, layer in smoothed.named_modules():
        if isinstance(layer, QuantizedLinear):
            # scales are stored in float16, whose last bit sums in another order may turn
            expected = layer.dequantize()
            torch.testing.assert_close(corrected.get_submodule(name).dequantize(), expected, rtol=2**-10, atol=1e-5)


def test_only_the_blocks_at_both_ends_have_a_rank_one_change(make_model, ids):
    correction = DistributionCorrection(epochs=1, alpha=None, clip_rate=0, compensation_rate=1.0)

    def change(first: int, last: int) -> list[int]:
        """Rank of what was added to the down projection of each block."""
        model, seen = make_model(), {}
        learn = DistributionCorrection._learn

        def watched(self, layers, loss, batches, index):
            seen[index] = [name for name, layer in layers.items() if layer.a is not None]
            return learn(self, layers, loss, batches, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DistributionCorrection, "_learn", watched)
            quantize(model, Recipe(FOUR_BITS, transforms=(replace(correction, first=first, last=last),)), ids)
        return [len(seen[index]) for index in range(2)]

    assert change(1, 0) == [1, 0]
    assert change(0, 1) == [0, 1]
    assert change(3, 4) == [1, 1]


def layer_of(generator, grid, **changed) -> _Layer:
    linear = nn.Linear(64, 8)
    linear.weight.data = torch.randn(8, 64, generator=generator)
    settings = {"activation": None, "scale": None, "clip": True, "compensated": True} | changed
    return _Layer(linear, grid, **settings)


@pytest.mark.parametrize("grid", [FOUR_BITS, IntGrid(3, None, symmetric=True), BitBalance(5, 32)], ids=str)
def test_clipped_weights_span_the_learnt_range(grid, generator):
    layer = layer_of(generator, grid)
    layer.high.data = torch.rand(layer.high.shape, generator=generator)
    W = layer.weight.unflatten(-1, (grid.groups(64), -1))
    clipped = layer.clipped(layer.weight).view_as(W)
    of_largest = W.abs().amax(-1) if layer.symmetric else W.amax(-1)
    end = layer.high.sigmoid()[..., 0] * of_largest
    torch.testing.assert_close(clipped.amax(-1), W.amax(-1).minimum(end))
    assert (clipped.abs() <= W.abs()).all()
    # rounded is what the grid makes of them
    rounded = grid.decode(grid.encode(clipped.flatten(-2), p := grid.fit(clipped.flatten(-2))), p)
    torch.testing.assert_close(layer.rounded(layer.weight), rounded, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_range_are_those_of_its_ends(generator):
    """Beyond the range 1, within it the error of rounding, in steps of the range."""
    grid = IntGrid(3, None, symmetric=True, restricted=True)
    layer = layer_of(generator, grid)
    layer.high.data -= 4.0
    (gradient,) = torch.autograd.grad(layer.rounded(layer.weight).sum(), layer.high)
    W, share = layer.weight, layer.high.sigmoid()[..., 0]
    end = share * W.abs().amax(-1, keepdim=True)
    q = (W / end).clamp(-1, 1).mul(3).round() / 3
    of_end = torch.where(W.abs() <= end, q - W / end, W.sign()).sum(-1)
    expected = of_end * W.abs().amax(-1) * (share * (1 - share))[:, 0]
    # the grid's scale is a float16
    torch.testing.assert_close(gradient.flatten(), expected.detach(), rtol=2e-2, atol=2e-2)


def test_attention_maps_are_those_of_the_attention(generator):
    query, key = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    value = torch.eye(5).expand(2, 2, 5, 5)
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    for given in ({"is_causal": True}, {"attn_mask": window}, {"attn_mask": torch.randn(5, 5), "scale": 0.3}):
        with attentions() as found:
            output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **given)
        # the values are unit vectors: what comes out are the maps
        torch.testing.assert_close(found[0]().softmax(-1), output, rtol=1e-4, atol=1e-6)
        assert float(divergence(found, found, None)) == 0


def test_divergence_is_the_sum_of_both_directions(generator):
    logits = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2)]
    found = []
    for each in logits:
        with attentions() as noted:
            F.softmax(each, -1)
        found.append(noted)
    p, q = (torch.distributions.Categorical(logits=each) for each in logits)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(torch.as_tensor(divergence(*found, None)), (kl(p, q) + kl(q, p)).mean())
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    rows = (kl(p, q) + kl(q, p)).mean(1)
    torch.testing.assert_close(torch.as_tensor(divergence(*found, mask)), rows[0, :2].mean())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_blocks_of_transformers_show_their_maps(implementation, make_model, kind, ids):
    model = make_model(kind)
    model.set_attn_implementation(implementation)
    with torch.no_grad(), attentions() as found:
        model(ids)
    assert [logits().shape for logits in found] == 2 * [(*ids.shape[:1], 4, *2 * ids.shape[1:])]


def test_padding_has_no_say(make_model, ids):
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    other = torch.where(mask.bool(), ids, 5)

    def decoded(rows: Tensor) -> Tensor:
        data = [{"input_ids": rows, "attention_mask": mask}]
        recipe = Recipe(IntGrid(2, 32), transforms=(DistributionCorrection(epochs=2),))
        return quantize(make_model(), recipe, data, keep=["layers.1"]).model.layers[0].mlp.up_proj.dequantize()

    torch.testing.assert_close(decoded(ids), decoded(other), rtol=1e-3, atol=1e-4)


def test_linears_that_are_kept_are_not_rounded(make_model, ids):
    seen: list[list[str]] = []
    learn = DistributionCorrection._learn

    def watched(self, layers, *arguments):
        seen.append(list(layers))
        return learn(self, layers, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributionCorrection, "_learn", watched)
        recipe = Recipe(FOUR_BITS, transforms=(DistributionCorrection(epochs=1),))
        model = quantize(make_model(), recipe, ids, keep=["o_proj", "layers.1"])
    assert len(seen) == 1
    assert "self_attn.o_proj" not in seen[0]
    assert len(seen[0]) == 6
    assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"alpha": 2.0}, "alpha must be 0 to 1, got 2.0"),
        ({"clip_rate": -1.0}, "clip_rate must not be negative, got -1.0"),
        ({"last": -1}, "last must not be negative, got -1"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        DistributionCorrection(**settings)
    assert isinstance(DistributionCorrection(), TaughtTransform)


def test_grids_without_ranges_are_refused(make_model, ids):
    recipe = Recipe(GaussianPairGrid(16, 32), transforms=(DistributionCorrection(epochs=1),))
    with pytest.raises(TypeError, match="DistributionCorrection .* GaussianPairGrid.* use an IntGrid"):
        quantize(make_model(), recipe, ids)


def test_a_loss_that_is_no_number_is_an_error(make_model, ids):
    """The authors' code stops in a debugger."""
    model = make_model()
    model.get_input_embeddings().weight.data[int(ids[0, 0])] = torch.inf
    with pytest.raises(ValueError, match="block 0: the loss of DistributionCorrection is nan: its inputs hold NaN"):
        folded(model, ids, DistributionCorrection(epochs=2, alpha=None), FOUR_BITS)


class Errors(NamedTuple):
    calibration: float
    held_out: float


@pytest.fixture
def text(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:40_000], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.mark.slow
def test_the_correction_lowers_the_error_of_a_block_below_learnt_clipping_alone(tiny_lm, text):
    """The paper's claim at W2A8, on one block of a trained model: on the calibration data and on other text."""
    rows, others = text[:16], text[16:32]

    def outputs(model) -> list[Tensor]:
        with torch.no_grad():
            inputs = [block_inputs(model, [model.model.layers[0]], [{"input_ids": part}])[0] for part in (rows, others)]
            return [each.run(0, model.model.layers[0]) for each in inputs]

    dense = outputs(tiny_lm)
    recipe = recipes.abq(2, 8, epochs=10)
    (full,) = recipe.transforms
    clips = replace(full, alpha=None, compensated=())

    def errors(*transforms) -> Errors:
        model = quantize(
            copy.deepcopy(tiny_lm), replace(recipe, transforms=transforms), rows.split(4), keep=["layers.[1-9]"]
        )
        return Errors(*(float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs(model), dense)))

    nearest, clipped, corrected = errors(), errors(clips), errors(full)
    for a, b, c in zip(corrected, clipped, nearest):
        assert a < b < c
