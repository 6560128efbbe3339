"""ButterflyQuant: always a rotation, never worse than what it starts from, better than Hadamard where it counts."""

import pytest
import torch
from torch import Tensor, nn

from tersor.quant import Recipe, quantize
from tersor.quant.calibration import SecondMoments
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import RTN, relative_error
from tersor.quant.transform import Butterfly, Hadamard, OnlineTransform


def loss(transform, stored, weight: Tensor, hessian: Tensor, grid: IntGrid) -> float:
    turned = transform.of_weight(weight, stored)
    codes, params = RTN().solve(turned, grid, None)
    return relative_error(weight, transform.undo(grid.decode(codes, params), stored), hessian)


@pytest.fixture
def problem(generator) -> tuple[Tensor, Tensor]:
    """A weight and second moments of inputs that differ in size and go together."""
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(-1, 1, 64)
    x = torch.randn(512, 64, generator=generator) @ mix
    moments = SecondMoments(64)
    moments.update(x)
    return torch.randn(48, 64, generator=generator), moments.mean


GRID = IntGrid(2, 32)


@pytest.mark.parametrize("width", [64, 48, 640])
def test_it_is_a_rotation_after_any_training(width, generator):
    weight, x = (torch.randn(n, width, generator=generator) for n in (16, 300))
    transform = Butterfly(steps=5, learning_rate=0.5)
    stored = transform.fit(weight, x.T @ x, IntGrid(2, 16))
    assert {name: (tuple(b.shape), b.dtype) for name, b in stored.items()} == transform.layout(width)
    B = transform.apply(torch.eye(width), stored)
    assert (B @ B.T - torch.eye(width)).abs().max() < 1e-5
    y = transform.apply(x, stored) @ transform.of_weight(weight, stored).T
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(transform.undo(transform.of_weight(weight, stored), stored), weight, rtol=0, atol=1e-5)


def test_it_starts_as_a_hadamard_matrix_with_signs(problem):
    stored = Butterfly(steps=0).fit(*problem, GRID)
    B = Butterfly().apply(torch.eye(64), stored)
    torch.testing.assert_close(B.abs(), torch.full((64, 64), 1 / 8), rtol=1e-5, atol=0)


def test_on_the_calibration_data_more_steps_are_never_worse_than_none(problem):
    losses = [
        loss(transform, transform.fit(*problem, GRID), *problem, GRID)
        for transform in (Butterfly(steps=0), Butterfly(steps=3, learning_rate=1.0), Butterfly(steps=40))
    ]
    # float32 sums in another order
    assert losses[1] <= losses[0] * (1 + 1e-5)
    assert losses[2] < losses[0]


def test_the_same_problem_gives_the_same_bits(problem):
    first, second = (Butterfly(steps=3).fit(*problem, GRID) for _ in range(2))
    assert torch.equal(first["angle_bits"], second["angle_bits"])


@torch.no_grad()
def test_angles_are_saved_with_the_model(make_model, ids, tmp_path):
    model = quantize(make_model("qwen2"), Recipe(GRID, transforms=(Butterfly(steps=2, layers=("down_proj",)),)), ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    turned = [n for n, m in again.named_modules() if isinstance(m, QuantizedLinear) and m.scheme.transform]
    assert turned == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@torch.no_grad()
def test_gradients_reach_the_input_of_a_layer(problem):
    linear = nn.Linear(64, 48)
    scheme = Recipe(GRID, transforms=(Butterfly(),)).scheme
    transform = Butterfly(steps=1)
    stored = transform.fit(linear.weight, problem[1], GRID)
    packed = GRID.pack(*RTN().solve(transform.of_weight(linear.weight, stored), GRID, None))
    layer = QuantizedLinear.from_linear(linear, scheme, packed, stored)
    with torch.enable_grad():
        x = torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_learned_rotations_beat_hadamards_on_inputs_not_learned_from(tiny_lm, held_out_text, tiny_lm_tokenizer):
    """At 2 bits, on linears of a trained model: the claim is four fifths of them; of seven tried, all did."""
    ids = tiny_lm_tokenizer(held_out_text[:16_000], return_tensors="pt").input_ids[0][: 12 * 256].view(12, 256)
    linears = {n: m for n, m in tiny_lm.model.layers[0].named_modules() if n.endswith(("q_proj", "o_proj", "up_proj"))}
    moments = {(name, part): SecondMoments(m.in_features) for name, m in linears.items() for part in (0, 1)}
    for part, text in enumerate((ids[:8], ids[8:])):
        hooks = [
            m.register_forward_pre_hook(lambda _, args, key=(n, part): moments[key].update(args[0].flatten(0, 1)))
            for n, m in linears.items()
        ]
        tiny_lm(text)
        for hook in hooks:
            hook.remove()
    grid, learned, fixed = IntGrid(2, 64), Butterfly(steps=60), Hadamard()
    for name, linear in linears.items():
        seen, unseen = moments[name, 0].mean, moments[name, 1].mean
        ours = loss(learned, learned.fit(linear.weight, seen, grid), linear.weight, unseen, grid)
        assert ours < loss(fixed, {}, linear.weight, unseen, grid), name


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"steps": -1}, "steps must not be negative"), ({"learning_rate": 0.0}, "learning_rate must be positive")],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Butterfly(**settings)


def test_odd_widths_and_missing_data_are_refused(make_model):
    with pytest.raises(ValueError, match="in = 33 is odd"):
        Butterfly().check(33)
    with pytest.raises(ValueError, match="learns from data"):
        quantize(make_model("llama"), Recipe(GRID, transforms=(Butterfly(),)))


def test_it_is_an_online_transform():
    assert isinstance(Butterfly(), OnlineTransform)
