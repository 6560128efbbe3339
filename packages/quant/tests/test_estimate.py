"""The estimate: what it says of sizes is what quantising leaves behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.quant import quantize, recipes
from tersor.quant.estimate import estimate
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear


@pytest.mark.parametrize("recipe", [recipes.rtn(3, 32), recipes.gptq(4, None, symmetric=True)], ids=str)
def test_sizes_are_those_of_the_quantised_model(make_model, kind, recipe, ids):
    allocation = {"model.layers.0.mlp.up_proj": IntGrid(8, 16)}
    original = make_model(kind)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(original.config)
    empty.tie_weights()
    whole = sum(parameter.nbytes for parameter in original.parameters())
    told = estimate(empty, recipe, 512, keep=["o_proj"], allocation=allocation)
    model = quantize(original, recipe, ids, keep=["o_proj"], allocation=allocation)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    nbytes = sum(layer.nbytes for layer in layers)
    assert sum(told.nbytes.values()) == nbytes
    assert told.bits_per_weight == 8 * nbytes / sum(layer.in_features * layer.out_features for layer in layers)
    assert told.other_nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert told.original_nbytes + told.other_nbytes == whole


def test_calibration_takes_time(make_model):
    model = make_model()
    little, much = (estimate(model, recipes.gptq(4, 32), tokens).seconds for tokens in (512, 2**24))
    assert 0 < little < much  # 32,768 times as many tokens


def test_what_quantize_refuses_is_refused(make_model):
    with pytest.raises(ValueError, match="keep names 'nothing'"):
        estimate(make_model(), recipes.rtn(4, 32), keep=["nothing"])
    with pytest.raises(ValueError, match="in = 96 is not a multiple of group_size = 64"):
        estimate(make_model(), recipes.rtn(4, 64))
