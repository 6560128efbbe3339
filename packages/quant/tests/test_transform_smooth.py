"""SmoothQuant and its kin: what the scales do to inputs and weights, and what is gained."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from tersor.quant import Recipe, quantize
from tersor.quant.activation import IntActivation
from tersor.quant.blocks import linears
from tersor.quant.calibration import batches, block_inputs
from tersor.quant.experts import separate_experts
from tersor.quant.grid import IntGrid
from tersor.quant.transform import (
    ActScale,
    BlockTransform,
    PercentileSmooth,
    SearchedSmooth,
    SearchedTransform,
    Smooth,
    UnsupportedFold,
)
from tersor.quant.transform.fold import Pair, fold_scale, scalable
from tersor.quant.transform.smooth import channel_maxima

GRID = IntGrid(4, 32)
BOTH = [Smooth(0.5), Smooth(0.85, 99.0), PercentileSmooth(0.9)]


def inputs_of(model, ids):
    return block_inputs(model, model.model.layers, batches(ids))


def fold_first_block(model, ids, transform) -> list[tuple[Pair, Tensor]]:
    """The pairs of the first block and their largest inputs, once they are scaled."""
    block, inputs = model.model.layers[0], inputs_of(model, ids)
    transform.fold_block(block, inputs, 0, {})
    pairs = scalable(block, inputs, 0)
    return list(zip(pairs, channel_maxima(pairs, block, inputs, 0)))


@pytest.mark.parametrize("transform", BOTH, ids=str)
@torch.no_grad()
def test_the_model_stays_the_same(transform, make_model, kind, ids):
    model = make_model(kind)
    before = model(ids).logits
    inputs = inputs_of(model, ids)
    for index, block in enumerate(model.model.layers):
        transform.check_block(block, inputs, index)
        transform.fold_block(block, inputs, index, {})
    # float32; exactness is shown in float64 for every fold
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_alpha_shares_the_difficulty_between_inputs_and_weights(make_model, kind, ids):
    """One half makes the largest of both the same, one leaves inputs of one, zero weights of one."""
    model = make_model(kind)
    block, inputs = model.model.layers[0], inputs_of(model, ids)
    pairs = scalable(block, inputs, 0)
    for pair, maxima in zip(pairs, channel_maxima(pairs, block, inputs, 0)):
        of_weight = torch.stack([reader.weight.abs().amax(0) for reader in pair.readers.values()]).amax(0)
        of_weight, ones = pair.per_channel(of_weight, "amax"), torch.ones_like(maxima)
        half, one, zero = (Smooth(alpha).scale(pair, maxima) for alpha in (0.5, 1.0, 0.0))
        torch.testing.assert_close(maxima / half, of_weight * half)
        torch.testing.assert_close(maxima / one, ones)
        torch.testing.assert_close(of_weight * zero, ones)


@torch.no_grad()
def test_dead_channels_keep_their_scale(make_model, ids):
    model = make_model("llama")
    norm, queries = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn
    norm.weight[3] = 0
    for linear in (queries.q_proj, queries.k_proj, queries.v_proj):
        linear.weight[:, 5] = 0
    before = norm.weight.clone()
    fold_first_block(model, ids, Smooth())
    assert torch.equal(norm.weight[[3, 5]], before[[3, 5]])
    assert (norm.weight != before).sum() == 62


@pytest.mark.parametrize("percentile", [100.0, 99.0, 50.0])
@torch.no_grad()
def test_percentiles_are_those_of_all_tokens_together(percentile, make_model, ids):
    model = make_model("llama")
    parts = [{"input_ids": ids[:3]}, {"input_ids": ids[3:10], "attention_mask": (ids[3:10] % 5 > 0).long()}]
    block, inputs = model.model.layers[0], block_inputs(model, model.model.layers, parts)
    pairs = scalable(block, inputs, 0)
    maxima = channel_maxima(pairs, block, inputs, 0, percentile)
    seen = []
    for each in inputs:
        x = block.input_layernorm(each.hidden)
        seen.append(x.flatten(0, 1) if each.mask is None else x[each.mask])
    x = torch.cat(seen).abs()
    assert pairs[0].name == "input_layernorm"
    rank = max(math.ceil(len(x) * percentile / 100), 1)
    torch.testing.assert_close(maxima[0], x.sort(0).values[rank - 1])


@torch.no_grad()
def test_only_channels_above_the_threshold_are_brought_down_to_it(make_model, ids):
    """Of 64 inputs a tenth, six; as many of the up projection's 96 are nine."""
    before = fold_first_block(make_model("llama"), ids, PercentileSmooth(1 - 1e-9))
    after = fold_first_block(make_model("llama"), ids, PercentileSmooth(0.9))
    for (pair, unscaled), (_, scaled) in zip(before, after):
        above = int(pair.channels * 0.1)
        threshold = unscaled.topk(above + 1).values[-1]
        torch.testing.assert_close(scaled, unscaled.clamp(max=threshold), rtol=1e-4, atol=0)
        assert (unscaled > threshold).sum() == above


@torch.no_grad()
def test_outlier_channels_cost_ten_decibels_less(generator):
    """8 bits on both sides, one scale for all tokens, 1 % of the channels 50 times larger."""
    norm, linear = nn.RMSNorm(512), nn.Linear(512, 256, bias=False)
    linear.weight.data = torch.randn(256, 512, generator=generator) / 512**0.5
    norm.weight.data[torch.randperm(512, generator=generator)[:5]] = 50
    h = torch.randn(1024, 512, generator=generator)
    x = norm(h)
    exact = linear(x)

    def noise_ratio(x: Tensor) -> float:
        grid = IntGrid(8, None, symmetric=True, restricted=True)
        params = grid.fit(linear.weight)
        step = x.abs().max() / 127
        y = (x / step).round() * step @ grid.decode(grid.encode(linear.weight, params), params).T
        return float(10 * torch.log10(exact.square().sum() / (y - exact).square().sum()))

    before = noise_ratio(x)
    pair = Pair("norm", norm, {"linear": linear}, {}, torch.arange(512))
    fold_scale(pair, Smooth(0.5).scale(pair, x.abs().amax(0)))
    torch.testing.assert_close(linear(norm(h)), exact, rtol=1e-4, atol=1e-4)
    assert noise_ratio(norm(h)) > before + 10


@torch.no_grad()
def test_smoothing_helps_a_model_with_outliers(make_model, ids):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[7] = layer.post_attention_layernorm.weight.data[9] = 100
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight.data[:, 7] /= 100
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[:, 9] /= 100
    exact = model(ids).logits
    recipe = Recipe(IntGrid(8, None, symmetric=True, restricted=True), activation=IntActivation())
    errors = []
    for transforms in ((), (Smooth(),)):
        each = Recipe(recipe.grid, transforms=transforms, activation=recipe.activation)
        errors.append(float((quantize(copy.deepcopy(model), each, ids)(ids).logits - exact).norm()))
    assert errors[1] < 0.2 * errors[0]


def test_the_search_finds_an_alpha_that_helps_a_trained_model(tiny_lm, held_out_text, tiny_lm_tokenizer):
    """The sum over blocks of squared differences to the original's outputs falls, weights at 4 bits per row."""
    ids = tiny_lm_tokenizer(held_out_text[:8_000], return_tensors="pt").input_ids[0][:512].view(2, 256)
    search = SearchedSmooth(step=0.25)

    @torch.no_grad()
    def outputs(model) -> list[Tensor]:
        # without the embeddings', and without the last, which are those of the norm after the blocks
        return list(model(ids, output_hidden_states=True).hidden_states[1:-1])

    exact = outputs(tiny_lm)
    losses = []
    for transforms in ((), (search,)):
        model = quantize(copy.deepcopy(tiny_lm), Recipe(IntGrid(4, None), transforms=transforms), ids)
        losses.append(sum(float((a - b).double().square().sum()) for a, b in zip(outputs(model), exact)))
    assert losses[1] < losses[0]
    # what was found is noted, not what was asked for
    (found,) = model.config.quantization_config.recipe["transforms"]
    assert found in [{"type": "Smooth", "alpha": each.alpha, "percentile": 100.0} for each in search.candidates()]


@pytest.mark.parametrize("transform", [Smooth(), ActScale(4)], ids=str)
@torch.no_grad()
def test_experts_that_the_first_batch_does_not_reach_are_scaled_too(transform, ids):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=97, num_local_experts=12, num_experts_per_tok=1)
    model = MixtralForCausalLM(config).eval()
    separate_experts(model)
    exact, block = model(ids).logits, model.model.layers[0]
    few = block_inputs(model, model.model.layers, [{"input_ids": ids[:1, :8]}])
    with pytest.raises(ValueError, match=r"no batch .* reaches all linears of block 0: mlp\.experts.*larger batches"):
        transform.fold_block(block, few, 0, dict.fromkeys(linears(block).values(), GRID))
    inputs = block_inputs(model, model.model.layers, [{"input_ids": ids[:1, :8]}, {"input_ids": ids}])
    norm = block.post_attention_layernorm.weight.clone()
    transform.fold_block(block, inputs, 0, dict.fromkeys(linears(block).values(), GRID))
    assert not torch.equal(block.post_attention_layernorm.weight, norm)
    torch.testing.assert_close(model(ids).logits, exact, rtol=1e-4, atol=1e-4)


def test_the_alphas_that_are_tried_end_with_one():
    assert [each.alpha for each in SearchedSmooth(0.4).candidates()] == [0, 0.4, 0.8, 1]
    assert len(SearchedSmooth(0.1).candidates()) == 11


@pytest.mark.parametrize(
    ("tokens", "percentile", "rank"), [(1000, 99.9, 2), (10_000, 99.9, 11), (999, 99.9, 1), (64, 50, 33)]
)
@torch.no_grad()
def test_a_percentile_is_the_nearest_rank_from_above(tokens, percentile, rank, make_model, generator):
    """So many tokens in one sequence, of which so many have a larger magnitude."""
    (inputs,) = inputs_of(make_model(), torch.arange(3, 35)[None])
    source, linear = nn.Linear(64, 64), nn.Linear(64, 8)
    pair = Pair("", source, {"": linear}, {}, torch.arange(64))
    hidden = torch.rand(1, tokens, 64, generator=generator)
    each = replace(inputs, hidden=hidden, arguments=[()], keywords=[{}])
    (found,) = channel_maxima([pair], linear, [each], 0, percentile)
    assert torch.equal(found, hidden[0].sort(0, descending=True).values[rank - 1])


@torch.no_grad()
def test_searching_changes_nothing(make_model, ids, all_on):
    model = make_model("llama")
    before, inputs = copy.deepcopy(model.state_dict()), inputs_of(model, ids)
    hidden = inputs[0].hidden.clone()
    SearchedSmooth(step=0.5).choose(model.model.layers, inputs, all_on(model, GRID))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(inputs[0].hidden, hidden)


@torch.no_grad()
def test_nothing_is_chosen_where_nothing_helps(make_model, ids, all_on):
    """Weights that are levels already: any scale takes them off."""
    model = make_model("llama")
    grid = IntGrid(4, None)
    for block in model.model.layers:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                params = grid.fit(linear.weight)
                linear.weight.copy_(grid.decode(grid.encode(linear.weight, params), params))
    assert SearchedSmooth(step=0.5).choose(model.model.layers, inputs_of(model, ids), all_on(model, grid)) == ()


def test_a_block_without_pairs_is_refused_before_anything_is_changed(make_model, ids):
    """Its linears read sums."""
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    for linear in linears(model.model.layers[1]).values():
        linear.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    with pytest.raises(UnsupportedFold, match="LlamaDecoderLayer has no norm or linear whose channels can be scaled"):
        quantize(model, Recipe(GRID, transforms=(Smooth(),)), ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("piece", "settings", "says"),
    [
        (Smooth, {"alpha": -0.1}, "alpha must be 0 to 1, got -0.1"),
        (Smooth, {"alpha": 1.1}, "alpha must be 0 to 1"),
        (Smooth, {"percentile": 0.0}, "percentile must be above 0 and at most 100"),
        (PercentileSmooth, {"quantile": 1.0}, "quantile must be between 0 and 1"),
        (SearchedSmooth, {"step": 0.0}, "step must be above 0"),
    ],
)
def test_bad_settings_are_named(piece, settings, says):
    with pytest.raises(ValueError, match=says):
        piece(**settings)


def test_they_are_transforms_and_need_data(make_model):
    assert isinstance(Smooth(), BlockTransform)
    assert isinstance(PercentileSmooth(), BlockTransform)
    assert isinstance(SearchedSmooth(), SearchedTransform)
    for transform in (Smooth(), SearchedSmooth()):
        with pytest.raises(ValueError, match="learns from data"):
            quantize(make_model("llama"), Recipe(GRID, transforms=(transform,)))
