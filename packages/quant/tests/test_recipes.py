"""Recipes: the pieces they pick, and on a trained model the order that they claim."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ, RTN

LENGTH = 256


def test_the_recipes_pick_their_pieces():
    assert recipes.rtn() == Recipe(IntGrid(4, 64), RTN())
    assert recipes.rtn(3, None, symmetric=True) == Recipe(IntGrid(3, None, symmetric=True), RTN())
    assert recipes.gptq() == Recipe(IntGrid(4, 64), GPTQ())
    assert recipes.gptq(8, 32, True, "none", 0.1) == Recipe(IntGrid(8, 32, symmetric=True), GPTQ(0.1, "none"))


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
