"""Integer products on a trained model: what DGQ, OdysseyLLM and COMET claim."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import BlockMixedActivation, IntActivation
from tersor.quant.calibration import SecondMoments
from tersor.quant.grid import DualGrain, IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import RTN, DualGrainSearch, relative_error
from tersor.quant.transform import LearnedRange

ROWS = IntGrid(4, None, symmetric=True)


@pytest.fixture
def text(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:24_000], return_tensors="pt").input_ids[0]
    return ids[: 20 * 256].view(20, 256)


@torch.no_grad()
def predictions(model, text: Tensor) -> Tensor:
    return torch.cat([model(part).logits.log_softmax(-1) for part in text.split(4)])


def divergence(model, recipe: Recipe, text: Tensor, dense: Tensor, **settings) -> float:
    """KL of the dense model's predictions to those of the quantised one, in nats per token; the last rows are held out."""
    model = quantize(copy.deepcopy(model), recipe, text[: -len(dense)], **settings)
    return float((dense.exp() * (dense - predictions(model, text[-len(dense) :]))).sum(-1).mean())


@torch.no_grad()
def test_two_grains_lose_no_more_than_rounding_on_real_scales(tiny_lm, text):
    """DGQ's claim, on the layers of a block: against groups rounded to nearest, and against rows."""
    block, moments = tiny_lm.model.layers[3], {}
    for name, linear in block.named_modules():
        if type(linear) is nn.Linear:
            moments[name] = SecondMoments(linear.in_features)
            linear.register_forward_pre_hook(lambda _, args, name=name: moments[name].update(args[0].flatten(0, 1)))
    tiny_lm.model(text[:12])
    ratios = []
    for name, seen in moments.items():
        W, H = block.get_submodule(name).weight, seen.mean
        losses = [
            relative_error(W, grid.decode(*solver.solve(W, grid, H)), H)
            for grid, solver in (
                (DualGrain(), DualGrainSearch()),
                (IntGrid(4, 128), RTN()),
                (IntGrid(4, None), RTN()),
            )
        ]
        ratios.append([losses[0] / losses[1], losses[0] / losses[2]])
    of_groups, of_rows = torch.tensor(ratios).T
    assert of_groups.max() < 1.1
    assert of_groups.mean() < 0.8
    assert of_rows.mean() < 0.6


def test_ranges_are_worth_learning_and_gptq_makes_up_for_what_they_clip(tiny_lm, text):
    """OdysseyLLM's pieces, in one block: rounding, with learned ranges, GPTQ, and both."""
    dense, keep = predictions(tiny_lm, text[-4:]), [f"layers.{i}" for i in (0, 1, 2, 4, 5)]
    recipe = replace(recipes.odyssey(), transforms=(LearnedRange(40),))
    rounded, ranged, solved, both = (
        divergence(tiny_lm, each, text[-8:], dense, keep=keep)
        for each in (
            replace(recipe, solver=RTN(), transforms=()),
            replace(recipe, solver=RTN()),
            replace(recipe, transforms=()),
            recipe,
        )
    )
    assert ranged < 0.9 * rounded
    assert both < 0.6 * rounded
    assert both < 1.05 * solved


@torch.no_grad()
def planted(model, generator):
    """The same function, with 3 % of the channels behind norms, and half as many before down projections, 64 times larger."""
    of_stream = torch.randperm(256, generator=generator)[:8]
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        block.input_layernorm.weight[of_stream] *= 64
        block.post_attention_layernorm.weight[of_stream] *= 64
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, of_stream] /= 64
        inner = torch.randperm(768, generator=generator)[:12]
        mlp.up_proj.weight[inner] *= 64
        mlp.down_proj.weight[:, inner] /= 64
    return model


def shares_of_low(model) -> float:
    blocks = [
        (layer.in_features // 32, len(layer.scheme.activation.high_groups))
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
    ]
    return 1 - sum(high for _, high in blocks) / sum(count for count, _ in blocks)


def test_outliers_in_a_few_blocks_of_eight_bits_leave_the_others_at_four(tiny_lm, text, generator):
    """COMET's claim, in blocks of 32 of 256 and 768 channels."""
    model, dense = planted(tiny_lm, generator), predictions(tiny_lm, text[-4:])
    text = text[-8:]
    comet = recipes.comet(32)
    plain = replace(comet, transforms=())
    losses = {
        bits: divergence(model, replace(plain, activation=IntActivation(bits, 32)), text, dense) for bits in (4, 8)
    }
    gathered, scattered = (quantize(copy.deepcopy(model), each, text[:4]) for each in (comet, plain))
    mixed = float((dense.exp() * (dense - predictions(gathered, text[4:]))).sum(-1).mean())
    assert mixed < 2 * losses[8]
    assert losses[4] > 10 * losses[8]
    assert shares_of_low(gathered) > 0.75
    assert shares_of_low(gathered) > shares_of_low(scattered) + 0.2


def test_without_outliers_four_bits_are_not_free(tiny_lm, text):
    """What the claim rests on: where no channel sticks out, all blocks have 4 bits, and cost what 4 bits cost."""
    dense = predictions(tiny_lm, text[-4:])
    comet = replace(recipes.comet(32), transforms=())
    mixed, low, high = (
        divergence(tiny_lm, replace(comet, activation=each), text[-8:], dense, keep=["down_proj", "o_proj"])
        for each in (BlockMixedActivation(32, tau=1e9), IntActivation(4, 32), IntActivation(8, 32))
    )
    # sums in another order round other inputs of later layers
    assert mixed == pytest.approx(low, rel=0.03)
    assert high < 0.7 * mixed
