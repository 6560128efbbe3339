"""Axis activation: inputs rounded token by token, and integer products where both sides are integers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor import kernels
from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import Activation, IntActivation
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN

INT8 = IntGrid(8, None, symmetric=True, restricted=True)
a_few = settings(max_examples=25, deadline=None, derandomize=True)
tokens = st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8), min_size=1, max_size=4).map(
    torch.tensor
)


def layer(grid, activation, linear: nn.Linear) -> QuantizedLinear:
    result = RTN().solve(linear.weight.detach().float(), grid, None)
    return QuantizedLinear.from_linear(linear, Scheme(grid, activation=activation), grid.pack(*result))


@pytest.fixture
def linear(generator) -> nn.Linear:
    linear = nn.Linear(64, 48)
    linear.weight.data = torch.randn(48, 64, generator=generator)
    return linear


@pytest.fixture
def x(generator) -> torch.Tensor:
    return torch.randn(3, 5, 64, generator=generator)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [4, None])
@a_few
@given(x=tokens)
def test_no_input_is_missed_by_more_than_half_a_step(bits, group_size, x):
    activation = IntActivation(bits, group_size)
    _, scale = activation.encode(x)
    step = scale.repeat_interleave(8 // scale.shape[-1], -1)
    # float32: the quotient is off by up to 127 * 2^-24 steps, the product by as much
    assert ((activation.quantise(x) - x).abs() <= step * (0.5 + 2**-15)).all()


@a_few
@given(x=tokens)
def test_rounded_inputs_stay_as_they_are(x):
    once = IntActivation().quantise(x)
    torch.testing.assert_close(IntActivation().quantise(once), once, rtol=2**-20, atol=0)


def test_each_token_is_rounded_by_itself(x):
    activation = IntActivation(4)
    alone = torch.stack([activation.quantise(token) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(activation.quantise(x), alone)


def test_zeros_stay_zeros_and_no_token_is_no_problem():
    assert torch.equal(IntActivation().quantise(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert IntActivation().quantise(torch.zeros(0, 8)).shape == (0, 8)


def test_clipping_helps_at_four_bits_with_gaussian_inputs(x):
    """The reason for QuaRot's .9."""
    error = {clip: (IntActivation(4, clip=clip).quantise(x) - x).square().mean() for clip in (1.0, 0.9)}
    assert error[0.9] < error[1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_eight_bits_by_eight_are_products_of_integers(linear, x, dtype):
    x = x.to(dtype)
    quantized = layer(INT8, IntActivation(), linear)
    codes, scale = IntActivation().encode(x)
    weight, params = INT8.unpack(quantized.stored(), quantized.weight_shape)
    product = codes.long() @ (weight.long() - 128).T
    exact = product * scale.double() * params.scale[:, 0].double() + linear.bias.detach()
    y = quantized(x)
    assert y.dtype == dtype
    # float32 scales, one rounding to the dtype, and the bias
    tolerance = 2 * max(torch.finfo(dtype).eps, 2**-22)
    torch.testing.assert_close(y.double(), exact.double(), rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("grid", "activation", "taken"),
    [
        (INT8, IntActivation(), "w8a8_linear"),
        (INT8, IntActivation(4), "w8a8_linear"),
        (IntGrid(8, None), IntActivation(), "wna8_linear"),
        (IntGrid(3, 32), IntActivation(), "wna8_linear"),
        (IntGrid(4, 32, float_zero=True), IntActivation(6), "wna8_linear"),
        (IntGrid(4, 32), IntActivation(8, 32), "wna8_linear"),
        (INT8, IntActivation(8, 32), None),
        (IntGrid(4, 32), IntActivation(8, 16), None),
    ],
    ids=str,
)
def test_products_are_those_of_integers_where_groups_allow(grid, activation, taken, linear, x, monkeypatch):
    called = []
    for name in ("w4a8_linear", "w8a8_linear", "wna8_linear"):
        op = getattr(kernels, name)
        monkeypatch.setattr(
            f"tersor.quant.grid.integer.{name}", lambda *args, name=name, op=op: called.append(name) or op(*args)
        )
    quantized = layer(grid, activation, linear)
    expected = activation.quantise(x) @ quantized.dequantize().T + linear.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)
    assert called == ([] if taken is None else [taken])


@pytest.mark.parametrize("activation", [IntActivation(4), IntActivation(6, 16), IntActivation(8, 32, 0.9)], ids=str)
@pytest.mark.parametrize("grid", [IntGrid(4, 32), INT8], ids=str)
def test_other_layers_multiply_the_rounded_input_with_the_decoded_weight(grid, activation, linear, x):
    quantized = layer(grid, activation, linear)
    expected = activation.quantise(x) @ quantized.dequantize().T + linear.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_more_bits_come_closer(linear, x):
    exact = layer(INT8, None, linear)(x)
    errors = [float((layer(INT8, IntActivation(bits), linear)(x) - exact).norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("activation", [IntActivation(), IntActivation(4, 32, 0.9)], ids=str)
@torch.no_grad()
def test_activations_are_saved_with_the_model(activation, make_model, ids, tmp_path):
    model = quantize(make_model("llama"), Recipe(INT8, activation=activation))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {m.scheme.activation for m in again.modules() if isinstance(m, QuantizedLinear)} == {activation}
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_eight_bits_on_both_sides_keep_a_model(make_model, kind, ids):
    model = make_model(kind)
    before = model(ids).logits
    after = quantize(copy.deepcopy(model), Recipe(INT8, activation=IntActivation()))(ids).logits
    assert (after - before).norm() < 0.05 * before.norm()


@torch.no_grad()
def test_rounded_inputs_cost_little_beside_what_weights_of_four_bits_do(tiny_lm, tiny_lm_tokenizer, held_out_text):
    """Measured: a 36th of the divergence that the weights cause; an 11th with one scale for all of a token."""
    ids = tiny_lm_tokenizer(held_out_text[:4000], return_tensors="pt").input_ids

    def predicted(activation_bits=None):
        model = quantize(copy.deepcopy(tiny_lm), recipes.rtn(4, 64, activation_bits=activation_bits))
        return model(ids).logits.log_softmax(-1)

    def divergence(one, other):
        return nn.functional.kl_div(other, one, log_target=True, reduction="none").sum(-1).mean()

    exact = predicted()
    weights, inputs = divergence(tiny_lm(ids).logits.log_softmax(-1), exact), divergence(exact, predicted(8))
    assert 0 < inputs < 0.1 * weights


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"clip": 0.0}, "clip must be above 0 and at most 1"),
        ({"clip": 1.5}, "clip must be above 0 and at most 1"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        IntActivation(**settings)


def test_groups_must_divide_before_anything_is_changed(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"q_proj: in = 64 is not a multiple of group_size = 48"):
        quantize(model, Recipe(INT8, activation=IntActivation(4, 48)))
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_it_is_an_activation():
    assert isinstance(IntActivation(), Activation)
