"""Axis grid: what holds for every grid, then what only integers claim."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.quant.grid import IntGrid, IntParams

WIDTH = 8
GRIDS = [IntGrid(bits, WIDTH, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
a_few = settings(max_examples=25, deadline=None, derandomize=True)
# 255 steps in float32: w / scale is off by up to 255 * 2**-24 steps
HALF_STEP = 0.5 + 2**-15

weights = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2 * WIDTH, max_size=2 * WIDTH), min_size=1, max_size=3
).map(torch.tensor)
zeros, constant, one_sided = torch.zeros(1, 2 * WIDTH), torch.full((1, 2 * WIDTH), -3.1), torch.rand(2, 2 * WIDTH) + 1
tiny, outlier = torch.full((1, 2 * WIDTH), 1e-9), torch.eye(2 * WIDTH)[:1] * 1e4 + 1e-3


def per_weight(p: Tensor) -> Tensor:
    return p.repeat_interleave(WIDTH, -1).float()


@every_grid
@a_few
@given(weight=weights)
@example(weight=zeros)
@example(weight=constant)
@example(weight=one_sided)
@example(weight=tiny)
@example(weight=outlier)
def test_no_weight_is_missed_by_more_than_half_a_step(grid, weight):
    params = grid.fit(weight)
    error = (grid.decode(grid.encode(weight, params), params) - weight).abs()
    assert (error <= per_weight(params.scale) * HALF_STEP).all()


@every_grid
@a_few
@given(weight=weights)
@example(weight=tiny)
def test_zero_is_a_level(grid, weight):
    weight[:, ::3] = 0
    params = grid.fit(weight)
    assert (grid.decode(grid.encode(weight, params), params)[:, ::3] == 0).all()


@every_grid
@a_few
@given(weight=weights)
def test_decoded_weights_are_fixed_points(grid, weight):
    params = grid.fit(weight)
    every_code = torch.arange(2**grid.bits).to(torch.uint8).repeat(len(weight), WIDTH)
    params = IntParams(*(p.repeat_interleave(every_code.shape[1] // WIDTH // 2, -1) for p in params))
    assert torch.equal(grid.encode(grid.decode(every_code, params), params), every_code)


@every_grid
def test_what_lies_beyond_the_levels_becomes_the_outermost_one(grid, generator):
    weight = torch.randn(4, 2 * WIDTH, generator=generator)
    params = grid.fit(weight)
    assert (grid.encode(torch.full_like(weight, 1e9), params) == 2**grid.bits - 1).all()
    assert (grid.encode(torch.full_like(weight, -1e9), params) == 0).all()


@every_grid
def test_groups_do_not_see_each_other(grid, generator):
    weight = torch.randn(4, 3 * WIDTH, generator=generator)
    whole = grid.fit(weight)
    for group, columns in enumerate(weight.split(WIDTH, -1)):
        for alone, together in zip(grid.fit(columns), whole):
            assert torch.equal(alone[:, 0], together[:, group])


@every_grid
def test_twice_the_weights_have_twice_the_scale_and_the_same_codes(grid, generator):
    weight = torch.randn(4, 2 * WIDTH, generator=generator)
    once, twice = grid.fit(weight), grid.fit(2 * weight)
    assert torch.equal(twice.scale, 2 * once.scale)
    assert torch.equal(grid.encode(2 * weight, twice), grid.encode(weight, once))


@every_grid
def test_a_group_of_zeros_stays_zero(grid):
    params = grid.fit(zeros)
    assert (params.scale == 1).all()
    assert (grid.decode(grid.encode(zeros, params), params) == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_per_channel_is_one_group_as_wide_as_the_row(symmetric, generator):
    weight = torch.randn(3, 40, generator=generator)
    for whole, group in zip(IntGrid(4, None, symmetric).fit(weight), IntGrid(4, 40, symmetric).fit(weight)):
        assert whole.shape == (3, 1)
        assert torch.equal(whole, group)


def test_ties_go_to_the_even_number_of_steps():
    params = IntParams(torch.ones(1, 1).half(), torch.full((1, 1), 8).to(torch.uint8))
    steps = IntGrid(4, None).encode(torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]]), params).int() - 8
    assert steps.tolist() == [[-2, 0, 0, 2, 2]]


def test_asymmetric_levels_reach_from_the_smallest_to_the_largest_weight():
    # 15 steps of 0.25, four of them below zero: exact in float16
    weight = torch.linspace(-1, 2.75, 16)[None]
    params = IntGrid(4, None).fit(weight)
    assert (params.scale.item(), params.zero_point.item()) == (0.25, 4)
    assert IntGrid(4, None).encode(weight, params).tolist() == [list(range(16))]


def test_symmetric_levels_have_zero_in_the_middle_whatever_the_signs():
    for weight in (one_sided, -one_sided, torch.randn(2, 2 * WIDTH)):
        assert (IntGrid(4, WIDTH, symmetric=True).fit(weight).zero_point == 8).all()


@pytest.mark.parametrize(
    ("bits", "asymmetric", "symmetric"),
    [(2, 0.2536, 0.303), (3, 0.0466, 0.0566), (4, 0.01013, 0.01232), (5, 0.00237, 0.00288), (6, 0.00057, 0.0007)],
)
def test_gaussian_error_is_the_known_one(bits, asymmetric, symmetric, generator):
    """Relative squared error of normal weights in groups of 128: a property of the grid, known from theory to 3%."""
    weight = torch.randn(128, 2048, generator=generator)
    for grid, expected in ((IntGrid(bits, 128), asymmetric), (IntGrid(bits, 128, symmetric=True), symmetric)):
        params = grid.fit(weight)
        error = (grid.decode(grid.encode(weight, params), params) - weight).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(expected, rel=0.03)


def test_the_error_of_a_group_that_does_not_divide_offers_those_that_do():
    with pytest.raises(
        ValueError, match="in = 100 is not a multiple of group_size = 48; use group_size = 50, 25, 20 or None"
    ):
        IntGrid(group_size=48).fit(torch.randn(4, 100))
    with pytest.raises(ValueError, match="use group_size = None"):
        IntGrid(group_size=64).groups(101)


def test_scales_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="beyond float16"):
        IntGrid(2, None).fit(torch.full((1, 8), 1e6))


@pytest.mark.parametrize("settings", [{"bits": 0}, {"bits": 9}, {"group_size": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        IntGrid(**settings)
