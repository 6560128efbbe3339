"""Scales of inputs that are known beforehand: what the walk finds, what saturates, what stays the same."""

import pytest
import torch
from torch import nn

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import CalibratedActivation, IntActivation, StaticActivation
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN
from tersor.quant.transform import Hadamard, Smooth

INT8 = IntGrid(8, None, symmetric=True, restricted=True)
INT4 = IntGrid(4, None, symmetric=True)


@pytest.fixture
def linear(generator) -> nn.Linear:
    linear = nn.Linear(64, 48)
    linear.weight.data = torch.randn(48, 64, generator=generator)
    return linear


@pytest.fixture
def x(generator) -> torch.Tensor:
    return torch.randn(3, 5, 64, generator=generator)


def layer(grid, activation, linear: nn.Linear) -> QuantizedLinear:
    result = RTN().solve(linear.weight.detach().float(), grid, None)
    return QuantizedLinear.from_linear(linear, Scheme(grid, activation=activation), grid.pack(*result))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_with_one_maximum_are_rounded_as_by_themselves(bits, dtype, x):
    x = x.clamp(-2, 2).to(dtype)
    x[..., 7] = 2
    static = StaticActivation(bits).fit(x.abs().amax((0, 1)))
    # scales in float64 and in float32 differ in the last bit
    torch.testing.assert_close(static.quantise(x), IntActivation(bits).quantise(x), rtol=2**-7, atol=0)


def test_what_was_never_seen_saturates_and_zeros_stay(x):
    static = StaticActivation(8).fit(x.abs().amax((0, 1)))
    largest = float(x.abs().max())
    torch.testing.assert_close(static.quantise(100 * x).abs().max(), torch.tensor(largest))
    assert not static.quantise(torch.zeros(2, 64)).any()
    assert StaticActivation().fit(torch.zeros(64)).scale == 1


@pytest.mark.parametrize("grid", [INT8, INT4, IntGrid(4, 32)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_rounded_input_multiplies_the_decoded_weight(grid, bits, linear, x):
    static = StaticActivation(bits).fit(x.abs().amax((0, 1)))
    quantized = layer(grid, static, linear)
    expected = static.quantise(x) @ quantized.dequantize().T + linear.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [INT8, INT4], ids=str)
def test_no_token_changes_another(grid, linear, x):
    """Unlike with scales of tokens, whose sums are scaled each by its own: here even that is common."""
    quantized = layer(grid, StaticActivation(8, 0.02), linear)
    assert torch.equal(quantized(x)[0, 0], quantized(x[0, 0]))


@pytest.mark.parametrize("recipe", [recipes.smoothquant(static=True), Recipe(INT4, activation=StaticActivation(6))])
@torch.no_grad()
def test_each_layer_knows_its_largest_input_on_the_calibration_data(recipe, make_model, ids, tmp_path):
    model = quantize(make_model(), recipe, ids)
    largest: dict[str, float] = {}

    def watch(name):
        def see(module, arguments):
            largest[name] = float(arguments[0].abs().max())

        return see

    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, each in layers.items():
        each.register_forward_pre_hook(watch(name))
    logits = model(ids).logits
    top = 2 ** (recipe.activation.bits - 1) - 1
    for name, each in layers.items():
        # the walk runs block by block: hardly anything is added up in another order
        assert top * each.scheme.activation.scale == pytest.approx(largest[name], rel=1e-4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits)


@torch.no_grad()
def test_padding_is_not_looked_at(make_model, ids):
    recipe = Recipe(INT8, activation=StaticActivation())
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    other = ids.clone()
    other[:, 20:] = 5
    first, second = (
        quantize(make_model(), recipe, [{"input_ids": each, "attention_mask": mask}]) for each in (ids, other)
    )
    assert [m.scheme for m in first.modules() if isinstance(m, QuantizedLinear)] == [
        m.scheme for m in second.modules() if isinstance(m, QuantizedLinear)
    ]


def test_it_needs_data_and_says_so(make_model, x):
    recipe = Recipe(INT8, activation=StaticActivation())
    assert recipe.needs_data
    with pytest.raises(ValueError, match="learns from data"):
        quantize(make_model(), recipe)
    with pytest.raises(ValueError, match="StaticActivation has no scale yet"):
        StaticActivation().quantise(x)


def test_transforms_at_run_time_are_refused():
    with pytest.raises(ValueError, match="learns from inputs before Hadamard.* has changed them"):
        Recipe(INT8, transforms=(Smooth(), Hadamard()), activation=StaticActivation())


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"bits": 1}, "bits must be 2 to 8, got 1"), ({"scale": 0.0}, "scale must be positive, got 0.0")],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        StaticActivation(**settings)


def test_it_is_a_calibrated_activation():
    assert isinstance(StaticActivation(), CalibratedActivation)
    assert not isinstance(IntActivation(), CalibratedActivation)
