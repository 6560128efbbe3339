"""SpQR: its limits are GPTQ and the weight itself; between them it trades outliers for error."""

import pytest
import torch

from tersor.quant import Recipe
from tersor.quant.compensation import SparseOutliers
from tersor.quant.grid import BilevelInt, IntGrid, bits_per_weight
from tersor.quant.solver import GPTQ, CoordinateDescent, LearnedRounding, SpQR, relative_error


@pytest.fixture
def layer(generator):
    """One weight in a hundred is ten times as large; inputs are correlated."""
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight = torch.randn(64, 128, generator=generator)
    weight *= 1 + 9 * (torch.rand(weight.shape, generator=generator) < 0.01)
    return weight, (x.T @ x).double() / len(x)


@pytest.mark.parametrize("order", ["group", "none"])
@pytest.mark.parametrize("grid", [IntGrid(3, 16), IntGrid(3, 16, float_zero=True), BilevelInt()], ids=str)
def test_with_an_infinite_threshold_it_is_gptq(order, grid, layer):
    gptq = GPTQ(order=order)
    codes, params, rest = SpQR(float("inf"), gptq).solve(layer[0], grid, layer[1])
    expected = gptq.solve(layer[0], grid, layer[1])
    assert torch.equal(codes, expected.codes)
    assert all(torch.equal(a, b) for a, b in zip(params, expected.params))
    assert not rest.any()


def test_without_a_threshold_the_weight_is_kept(layer):
    weight, H = layer
    codes, params, rest = SpQR(0.0).solve(weight, BilevelInt(), H)
    torch.testing.assert_close(BilevelInt().decode(codes, params) + rest, weight)


@pytest.mark.parametrize("grid", [BilevelInt(), IntGrid(3, 16)], ids=str)
def test_rows_that_are_all_alike_have_no_outliers(grid):
    assert not SpQR().solve(torch.full((16, 32), 0.1234567), grid, torch.eye(32, dtype=torch.float64)).rest.any()


def outliers(layer, tau):
    rest = SpQR(tau).solve(layer[0], BilevelInt(), layer[1]).rest
    return float((rest != 0).float().mean())


def test_the_share_of_outliers_is_found_by_bisection(layer):
    asked, low, high = 0.02, 1e-2, 1e1
    assert outliers(layer, low) > asked > outliers(layer, high)
    for _ in range(8):
        tau = (low * high) ** 0.5
        low, high = (tau, high) if outliers(layer, tau) > asked else (low, tau)
    assert outliers(layer, high) == pytest.approx(asked, rel=0.2)


def test_with_heavy_tails_it_loses_less_than_gptq_in_fewer_bits(layer):
    weight, H = layer
    plain = IntGrid(4, 128)
    dense = relative_error(weight, plain.decode(*GPTQ().solve(weight, plain, H)), H)
    codes, params, rest = SpQR(1.0).solve(weight, BilevelInt(), H)
    piece, stored = SparseOutliers().fit(rest, H)
    decoded = BilevelInt().decode(codes, params) + piece.decode(stored, (64, 128))
    bits = bits_per_weight(BilevelInt(), 64, 128) + 8 * sum(t.nbytes for t in stored.values()) / weight.numel()
    assert bits <= 4.125
    assert relative_error(weight, decoded, H) < dense


@pytest.mark.parametrize("after", [CoordinateDescent, LearnedRounding])
def test_solvers_that_come_after_it_keep_its_outliers(after, layer):
    (weight, H), grid = layer, IntGrid(3, 16)
    before, later = SpQR(1.0).solve(weight, grid, H), after(SpQR(1.0)).solve(weight, grid, H)
    errors = [relative_error(weight, grid.decode(codes, params) + rest, H) for codes, params, rest in (before, later)]
    assert torch.equal(later.rest, before.rest)
    assert errors[1] <= errors[0]
    assert errors[1] < errors[0] or after is LearnedRounding


def test_outliers_must_have_a_place():
    for solver in (SpQR(), CoordinateDescent(SpQR())):
        with pytest.raises(ValueError, match=r"add compensation=SparseOutliers\(\)"):
            Recipe(BilevelInt(), solver)
    assert Recipe(BilevelInt(), SpQR(), compensation=SparseOutliers()).needs_hessian


@pytest.mark.parametrize("setting", [{"tau": -1.0}, {"gptq": GPTQ()}], ids=str)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SpQR(**setting)


def test_three_bits_in_groups_of_16_take_three_and_five_eighths():
    # 3 bits of code; per group two statistics of 3 bits; per 16 of these two pairs of 16 bits
    assert bits_per_weight(BilevelInt(), 256, 512) == 3 + 2 * 3 / 16 + 4 * 16 / (16 * 16)


def test_statistics_of_eight_bits_are_nearly_those_of_the_group(generator):
    weight = torch.randn(32, 64, generator=generator)
    fine, plain = BilevelInt(4, 16, stat_bits=8), IntGrid(4, 16, float_zero=True)
    scale, zero_point = fine.scale_and_zero(fine.fit(weight))
    exact = plain.fit(weight)
    # half of 1/255 of the range over 16 rows
    assert ((scale - exact.scale).abs() <= (exact.scale.max() - exact.scale.min()) / 255).all()
    assert ((zero_point - exact.zero_point).abs() <= 16 / 255).all()


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(16, 16)
    assert not BilevelInt().decode(BilevelInt().encode(weight, params := BilevelInt().fit(weight)), params).any()


def test_rows_must_fill_the_blocks():
    with pytest.raises(ValueError, match="out = 24 is not a multiple of stat_group = 16; use stat_group = 12"):
        BilevelInt().check(24, 32)
