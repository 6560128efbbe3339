"""Recipes: the pieces they pick, and on a trained model the order that they claim."""

import copy
import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.allocation import Evolution
from tersor.quant.grid import IntGrid, NormalFloatGrid, SignLowRankStack
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ, RTN
from tersor.quant.tuning import PV, BlockReconstruction, LearnedClip, LearnedStep, StraightThrough

LENGTH = 256


def test_the_recipes_pick_their_pieces():
    assert recipes.rtn() == Recipe(IntGrid(4, 64), RTN())
    assert recipes.rtn(3, None, symmetric=True) == Recipe(IntGrid(3, None, symmetric=True), RTN())
    assert recipes.gptq() == Recipe(IntGrid(4, 64), GPTQ())
    assert recipes.gptq(8, 32, True, "none", 0.1) == Recipe(IntGrid(8, 32, symmetric=True), GPTQ(0.1, "none"))


@pytest.mark.parametrize("make", [recipes.evopress, recipes.calibtip, recipes.ohq], ids=lambda make: make.__name__)
def test_mixed_grids_have_one_below_and_one_above(make):
    assert [grid.bits for grid in make(2).allocation.grids] == [1, 2, 3]
    for bits in (1, 8):
        with pytest.raises(ValueError, match=f"bits must be 2 to 7.*, got {bits}"):
            make(bits)


def test_tunings_that_need_levels_or_codes_are_refused_before_any_work():
    for tuning in (LearnedStep(), LearnedClip(), BlockReconstruction()):
        with pytest.raises(
            TypeError, match=f"{type(tuning).__name__} needs evenly spaced levels, which NormalFloatGrid"
        ):
            Recipe(NormalFloatGrid(32), tuning=(tuning,))
    for tuning in (PV(), StraightThrough()):
        with pytest.raises(TypeError, match="moves codes of neighbours in a row, which those of SignLowRankStack"):
            Recipe(SignLowRankStack(2, 4), tuning=(tuning,))


EVERY = [getattr(recipes, name) for name in recipes.__all__]
# knobs that suit models of width 64 and 96, and keep the tests short
SMALL = {
    "abq": {"epochs": 2},
    "aqlm": {"codebook_bits": 5, "steps": 5, "tolerance": 0.9},
    "awq": {"group_size": 32},
    "bitstack": {"blocks": 2, "rank": 4},
    "bipolar_int": {"group_size": 32},
    "brecq": {"group_size": 32, "steps": 10},
    "butterflyquant": {"group_size": 32, "steps": 3},
    "calibtip": {"group_size": 32},
    "comet": {"group_size": 32},
    "dbllm": {"group_size": 32, "steps": 5},
    "dgq": {"group_size": 32},
    "eora": {"group_size": 32, "rank": 4},
    "evopress": {"group_size": 32, "search": Evolution(generations=2, offspring=4, survivors=(1,), tokens=(128,))},
    "gptq": {"group_size": 32},
    "higgs": {"group_size": 32},
    "hqq": {"group_size": 32},
    "nf4": {"group_size": 32},
    "odyssey": {"steps": 5},
    "ohq": {"group_size": 32},
    "ptq161": {"steps": 10},
    "pv_tuning": {"vector_size": 4, "codebook_bits": 5, "steps": 5, "tolerance": 0.9},
    "quantease": {"group_size": 32},
    "rtn": {"group_size": 32},
    "seedlm": {"seed_bits": 8},
    "smoothquant_plus": {"group_size": 32},
}


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.__name__)
def test_every_recipe_quantises_saves_and_comes_back(recipe, make_model, ids, tmp_path):
    original = make_model()
    with torch.no_grad():
        dense = original(ids).logits
        model = quantize(original, recipe(**SMALL.get(recipe.__name__, {})), ids)
        logits = model(ids).logits
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 2 * 7
    assert all(0 < layer.relative_error < 0.5 for layer in layers)
    assert not torch.equal(logits, dense)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.__name__)
def test_every_recipe_names_its_source(recipe):
    assert re.match(r"[\w+.\- ]+ \((arXiv:\d{4}\.\d{5}|https://\S+)\): .+", recipe.__doc__.splitlines()[0])


@pytest.fixture
def rows(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:160_000], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


class Quality(NamedTuple):
    perplexity: float
    divergence: float  # KL of the dense model's predictions to these, in nats per token


@torch.no_grad()
def predictions(model, text) -> Tensor:
    return torch.cat([model(part).logits.log_softmax(-1) for part in text.split(4)])


def quality(model, text, dense: Tensor) -> Quality:
    log_p = predictions(model, text)
    loss = -log_p[:, :-1].gather(-1, text[:, 1:, None]).mean()
    return Quality(math.exp(loss), float((dense.exp() * (dense - log_p)).sum(-1).mean()))


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (2, 32)])
def test_gptq_keeps_more_of_a_trained_model_than_rounding(bits, group_size, tiny_lm, rows):
    """On text that neither the model nor the calibration has seen."""
    calibration, text = rows[:24], rows[-12:]
    dense = predictions(tiny_lm, text)
    original = quality(tiny_lm, text, dense)
    nearest = quality(quantize(copy.deepcopy(tiny_lm), recipes.rtn(bits, group_size)), text, dense)
    ours = quality(quantize(tiny_lm, recipes.gptq(bits, group_size), calibration), text, dense)
    assert original.perplexity < ours.perplexity < nearest.perplexity
    assert ours.divergence < 0.5 * nearest.divergence


def test_four_bits_keep_a_trained_model_in_a_third_of_its_bytes(tiny_lm, rows):
    calibration, text = rows[:24], rows[-12:]
    dense = predictions(tiny_lm, text)
    original = quality(tiny_lm, text, dense)
    weights = sum(m.weight.numel() for m in tiny_lm.model.layers.modules() if isinstance(m, torch.nn.Linear))
    model = quantize(tiny_lm, recipes.gptq(), calibration)
    stored = sum(layer.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert stored <= 0.3 * 2 * weights  # of bfloat16
    ours = quality(model, text, dense)
    assert ours.perplexity < 1.02 * original.perplexity
    assert ours.divergence < 0.02
