"""What papers claim against what was there before: on a trained model, on other text, in no more stored bytes."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.linear import QuantizedLinear

pytestmark = pytest.mark.slow

LENGTH = 256
# to be kept, for recipes of minutes: all blocks but the last
LAST_BLOCK = [f"layers.{index}" for index in range(5)]


class Kept(NamedTuple):
    nbytes: int
    divergence: float  # KL of the dense model's predictions to these, in nats per token


@torch.no_grad()
def predictions(model, text: Tensor) -> Tensor:
    return torch.cat([model(part).logits[:, :-1].log_softmax(-1) for part in text.split(4)])


@pytest.fixture(scope="module")
def kept(zoo, held_out_text, tiny_lm_tokenizer):
    """What is left of tiny-lm with a recipe, and in how many bytes; each is quantised once."""
    ids = tiny_lm_tokenizer(held_out_text[:100_000], return_tensors="pt").input_ids[0, : 36 * LENGTH].view(36, LENGTH)
    calibration, text = ids[:24], ids[24:]
    dense, found = predictions(zoo.load_model("tiny-lm"), text), {}

    def measured(recipe: Recipe, keep: tuple[str, ...] = ()) -> Kept:
        if (recipe, keep) not in found:
            model = quantize(zoo.load_model("tiny-lm"), recipe, calibration, keep=keep)
            nbytes = sum(layer.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
            divergence = (dense.exp() * (dense - predictions(model, text))).sum(-1).mean()
            found[recipe, keep] = Kept(nbytes, float(divergence))
        return found[recipe, keep]

    return measured


def rotated(recipe: Recipe) -> Recipe:
    return replace(recipe, transforms=recipes.quarot().transforms)


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [
        pytest.param(recipes.awq(3, 64), recipes.rtn(3, 64), 0.96, id="AWQ, rounding, 3 bits"),
        pytest.param(recipes.nf4(64), recipes.rtn(4, 128), 0.9, id="NF4, rounding, 4 bits"),
        pytest.param(recipes.higgs(256, 128), recipes.nf4(64), 0.9, id="HIGGS in pairs, NF4"),
        pytest.param(rotated(recipes.gptq(3)), recipes.gptq(3), 0.9, id="GPTQ after rotations, GPTQ, 3 bits"),
        pytest.param(rotated(recipes.gptq(2)), recipes.gptq(2), 0.9, id="GPTQ after rotations, GPTQ, 2 bits"),
        pytest.param(recipes.spqr(3, 32, 0.42), recipes.gptq(3, 32), 0.95, id="SpQR, GPTQ, 3.6 bits"),
    ],
)
def test_it_loses_less_than_the_one_before_in_no_more_bytes(ours, theirs, ratio, kept):
    ours, theirs = kept(ours), kept(theirs)
    assert ours.nbytes <= theirs.nbytes
    assert ours.divergence < ratio * theirs.divergence
