"""Layers that hold their weights decoded for a while: the same outputs, and nothing of it is left."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import (
    BipolarActivation,
    BlockMixedActivation,
    IntActivation,
    PlaneActivation,
    StaticActivation,
)
from tersor.quant.calibration import SecondMoments
from tersor.quant.compensation import LowRank, SparseOutliers
from tersor.quant.grid import BipolarInt, DualGrain, IntGrid, KMeansGrid
from tersor.quant.layers import solve
from tersor.quant.linear import QuantizedLinear, decoded
from tersor.quant.solver import GPTQ, SpQR
from tersor.quant.transform import Butterfly, Hadamard

INT4, INT8 = IntGrid(4, 32), IntGrid(8, None, symmetric=True, restricted=True)
# (grids alone: test_grid_properties.py)
RECIPES = [
    Recipe(INT4, GPTQ()),
    Recipe(INT8, activation=IntActivation()),
    Recipe(INT4, activation=IntActivation(4, 32)),
    Recipe(DualGrain(32), activation=IntActivation()),
    Recipe(INT8, activation=StaticActivation()),
    Recipe(INT4, activation=PlaneActivation(4)),
    Recipe(BipolarInt(3, 32), activation=BipolarActivation(6)),
    Recipe(KMeansGrid(3), activation=BlockMixedActivation(16)),
    Recipe(INT4, transforms=(Hadamard(),)),
    Recipe(INT4, transforms=(Butterfly(2),)),
    Recipe(INT4, compensation=LowRank(4)),
    Recipe(INT4, SpQR(0.5), compensation=SparseOutliers()),
    Recipe(INT8, GPTQ(), (Hadamard(32),), IntActivation(), LowRank(4)),
]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(3, 40, 96, generator=generator)


@pytest.fixture
def make_layer(generator, x):
    def make(recipe: Recipe) -> QuantizedLinear:
        linear = nn.Linear(96, 24)
        linear.weight.data = torch.randn(24, 96, generator=generator)
        moments = SecondMoments(96)
        moments.update(x.flatten(0, 1))
        with torch.no_grad():
            ((_, layer),) = solve({"layer": linear}, recipe, {"layer": recipe.scheme}, moments)
        return layer

    return make


def holds_its_weight(layer: QuantizedLinear) -> bool:
    """Whether a tensor of the weight's shape can be reached that is not stored."""
    held = torch.utils._pytree.tree_leaves([value for value in vars(layer).values() if isinstance(value, list | tuple)])
    return any(isinstance(t, Tensor) and t.is_floating_point() and t.shape == layer.weight_shape for t in held)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_what_layers_compute_stays_the_same(recipe, dtype, make_layer, x):
    layer, x = make_layer(recipe).to(dtype), x.to(dtype)
    y = layer(x)
    with decoded(layer):
        again = layer(x)
        assert holds_its_weight(layer)
    assert again.dtype == dtype
    # sums of 96 products in another order; a bfloat16 has 8 bits, and rounded inputs are rounded to those once more
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(again, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


class Stopped(Exception):
    pass


@every_recipe
@torch.no_grad()
def test_afterwards_nothing_is_left_of_it(recipe, make_layer, x):
    block = nn.Sequential(make_layer(recipe))
    y, stored = block(x), {name: tensor.clone() for name, tensor in block.state_dict().items()}

    def stop() -> None:
        with decoded(block):
            block(x)
            raise Stopped

    with decoded(block):
        block(x)
    assert not holds_its_weight(block[0])
    with pytest.raises(Stopped):
        stop()
    assert not holds_its_weight(block[0])
    assert torch.equal(block(x), y)
    assert block.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in block.state_dict().items())


@torch.no_grad()
def test_what_is_stored_inside_is_used_from_then_on(make_layer, x):
    layer, other = make_layer(RECIPES[0]), make_layer(RECIPES[0])
    with decoded(layer):
        before = layer(x)
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("last", [9, 14])
def test_the_walk_leaves_no_decoded_weights(last, make_model, ids):
    model = make_model()

    def progress(done, total, name):
        if done == last:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(model, recipes.gptq(4, 32), ids, progress=progress)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) >= 7
    with torch.no_grad():
        for layer in layers:
            layer(torch.randn(1, layer.in_features))
            assert not holds_its_weight(layer)


@pytest.mark.parametrize("recipe", [RECIPES[2], RECIPES[8], RECIPES[10]], ids=str)
@torch.no_grad()
def test_the_walk_ends_where_it_would_with_layers_as_they_are_stored(recipe, make_model, ids, monkeypatch):
    recipe = replace(recipe, solver=GPTQ())
    with_decoded = quantize(make_model(), recipe, ids)
    monkeypatch.setattr("tersor.quant.layers.decoded", nullcontext)
    as_stored = quantize(make_model(), recipe, ids)
    for name, layer in as_stored.named_modules():
        if isinstance(layer, QuantizedLinear):
            # sums in another order: hardly ever, a weight half-way between two levels falls to the other side
            same = layer.codes == with_decoded.get_submodule(name).codes
            assert same.float().mean() > 0.99, name
    torch.testing.assert_close(with_decoded(ids).logits, as_stored(ids).logits, rtol=1e-2, atol=1e-2)
