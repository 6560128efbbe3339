"""Grids of two grains: all weights are integers of 8 bits times one scale per row; DGQ's search for their scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.quant.activation import IntActivation, StaticActivation
from tersor.quant.grid import DualGrain, DualGrainParams, IntegerGrid, IntGrid, ScalarGrid, bits_per_weight
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import GPTQ, RTN, CoordinateDescent, DualGrainSearch, relative_error

a_few = settings(max_examples=25, deadline=None, derandomize=True)
GRID = DualGrain(16)


@pytest.fixture
def problem(generator) -> tuple[Tensor, Tensor]:
    """Weights whose groups differ in size, and second moments of correlated inputs."""
    weight = torch.randn(24, 64, generator=generator)
    weight *= torch.tensor([0.2, 1.0, 0.5, 0.1]).repeat_interleave(16)
    x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return weight, (x.T @ x).double() / len(x)


@a_few
@given(sizes=st.lists(st.floats(-30, 10), min_size=4, max_size=4), seed=st.integers(0, 10**6))
def test_all_weights_are_integers_of_eight_bits(sizes, seed):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    weight *= 2.0 ** torch.tensor(sizes).repeat_interleave(16)
    params = GRID.fit(weight)
    integers = GRID.integers(GRID.encode(weight, params), params)
    assert integers.abs().max() <= 127
    assert torch.equal(integers, integers.round())
    assert torch.equal(GRID.decode(GRID.encode(weight, params), params), integers * params.scale)


@a_few
@given(step=st.integers(1, 127), zero_point=st.integers(0, 15), seed=st.integers(0, 10**6))
def test_of_the_levels_within_eight_bits_the_nearest_is_chosen(step, zero_point, seed):
    weight = 100 * torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    one = torch.ones(2, 1)
    params = DualGrainParams(one, (step * one).to(torch.uint8), (zero_point * one).to(torch.uint8))
    levels = step * (torch.arange(16.0) - zero_point)
    levels = levels[levels.abs() <= 127]
    nearest = (weight[..., None] - levels).abs().amin(-1)
    assert torch.equal((GRID.decode(GRID.encode(weight, params), params) - weight).abs(), nearest)


def test_groups_of_one_range_are_rounded_as_integers_are(generator):
    """7.5 steps to both sides, and the row's scale a 17th of the step: nothing is left to the second grain."""
    weight = torch.rand(4, 64, generator=generator) * 15 - 7
    weight[:, ::16], weight[:, 1::16] = -7, 8
    params = DualGrainParams(torch.full((4, 1), 1 / 15), torch.full((4, 4), 15).byte(), torch.full((4, 4), 7).byte())
    plain = IntGrid(4, 16)
    expected = plain.decode(plain.encode(weight, plain.fit(weight)), plain.fit(weight))
    decoded = GRID.decode(GRID.encode(weight, params), params)
    torch.testing.assert_close(decoded, expected, rtol=2**-22, atol=0)


def test_bits_are_four_and_what_the_grains_take():
    # a step of 8 bits and a zero point of 4 per group, 32 bits per row
    assert bits_per_weight(DualGrain(128), 256, 4096) == 4 + 12 / 128 + 32 / 4096


def layer(weight: Tensor, codes: Tensor, params: DualGrainParams, activation) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return QuantizedLinear.from_linear(linear, Scheme(GRID, activation=activation), GRID.pack(codes, params))


@pytest.mark.parametrize("activation", [IntActivation(), StaticActivation(8, 0.03125)], ids=str)
def test_products_are_those_of_integers_exactly(activation, problem, generator):
    weight, H = problem
    codes, params = DualGrainSearch(5, 10).solve(weight, GRID, H)
    # powers of two: scaling rounds nothing
    params = params._replace(scale=2.0 ** (torch.arange(24.0)[:, None] % 5 - 7))
    x = torch.randint(-127, 128, (2, 5, 64), generator=generator).float()
    x[..., 0] = 127
    x = x * 0.03125
    exact = x.double() @ GRID.decode(codes, params).double().T
    assert torch.equal(layer(weight, codes, params, activation)(x).double(), exact)


def test_without_an_activation_the_decoded_weight_multiplies(problem, generator):
    weight, _ = problem
    quantized, x = layer(weight, *RTN().solve(weight, GRID, None), None), torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(quantized(x), x @ quantized.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [RTN(), DualGrainSearch(5, 10), GPTQ(), GPTQ(order="group"), CoordinateDescent()])
def test_every_solver_keeps_to_eight_bits(solver, problem):
    weight, H = problem
    codes, params = solver.solve(weight, GRID, H)
    assert GRID.integers(codes, params).abs().max() <= 127
    if not isinstance(solver, RTN):
        nearest = RTN().solve(weight, GRID, None)
        error = relative_error(weight, GRID.decode(codes, params), H)
        assert error < relative_error(weight, GRID.decode(*nearest), H)


def test_the_search_tries_each_ratio_on_the_whole_weight(problem):
    """Row by row and group by group as in the paper: not on what the ratio before has left, as in the authors' code."""
    weight, H = problem[0][:3], problem[1].float()
    fine, coarse = 20, 30
    found = DualGrainSearch(fine, coarse).solve(weight, GRID, H)
    real = IntGrid(4, 16)
    for row in range(3):
        low, high = torch.empty(1, 4), torch.empty(1, 4)
        for group in range(4):
            here = slice(16 * group, 16 * group + 16)
            w, losses = weight[row : row + 1, here], []
            ranges = [(r * w.amin(), r * w.amax()) for r in (1.02 - 0.011 * (i + 1) for i in range(fine))]
            for a, b in ranges:
                params = real.spanning(a.view(1, 1), b.view(1, 1))
                error = w - real.decode(real.encode(w, params), params)
                losses.append(float(error @ H[here, here] @ error.T))
            low[0, group], high[0, group] = ranges[losses.index(min(losses))]
        w, losses, tried = weight[row : row + 1], [], []
        for i in range(coarse):
            tried.append(GRID.spanning(low, high, (1.02 - 0.01025 * (i + 1)) * w.abs().amax().view(1, 1) / 127))
            error = w - GRID.decode(GRID.encode(w, tried[-1]), tried[-1])
            losses.append(float(error @ H @ error.T))
        best = tried[losses.index(min(losses))]
        assert torch.equal(found.codes[row : row + 1], GRID.encode(w, best))
        assert all(torch.equal(p[row : row + 1], b) for p, b in zip(found.params, best))


def test_the_search_costs_at_most_a_tenth_over_real_scales_and_less_than_rows_alone(problem):
    weight, H = problem

    def error(solver, grid) -> float:
        return relative_error(weight, grid.decode(*solver.solve(weight, grid, H)), H)

    searched = error(DualGrainSearch(), GRID)
    assert searched < 1.1 * error(RTN(), IntGrid(4, 16))
    assert searched < 0.5 * error(RTN(), IntGrid(4, None))
    assert searched < error(RTN(), GRID)


def test_bad_settings_are_named(problem):
    weight, H = problem
    with pytest.raises(ValueError, match="group_size must be positive or None"):
        DualGrain(0)
    with pytest.raises(ValueError, match="fine must be 1 to 90 and coarse 1 to 95, got 0 and 80"):
        DualGrainSearch(0)
    with pytest.raises(TypeError, match="needs scales of two levels, which IntGrid.* use a DualGrain"):
        DualGrainSearch().solve(weight, IntGrid(), H)
    with pytest.raises(ValueError, match="needs calibration data"):
        DualGrainSearch().solve(weight, GRID, None)
    with pytest.raises(ValueError, match="in = 64 is not a multiple of group_size = 48"):
        DualGrain(48).check(4, 64)


def test_it_is_a_scalar_and_an_integer_grid():
    assert isinstance(GRID, ScalarGrid)
    assert isinstance(GRID, IntegerGrid)
