"""MXFP4 and NVFP4: scales that are small floats themselves."""

import pytest
import torch

from tersor.quant.grid import IntGrid, MXFP4Grid, NormalFloatGrid, NVFP4Grid, bits_per_weight
from tersor.quant.solver import relative_error


def rounded(weight, grid):
    params = grid.fit(weight)
    return grid.decode(grid.encode(weight, params), params)


def test_bits_are_those_of_the_formats():
    assert bits_per_weight(MXFP4Grid(), 64, 256) == 4 + 8 / 32
    assert bits_per_weight(NVFP4Grid(), 64, 256) == 4 + 8 / 16 + 32 / (64 * 256)


@pytest.mark.parametrize(("rule", "carry"), [("even", 1.75), ("floor", 2.0)])
def test_mxfp4_scales_step_to_the_next_power_where_the_rule_says(rule, carry):
    grid = MXFP4Grid(rule)
    for exponent in (-20, -1, 0, 9):
        for mantissa, expected in ((1.0, 1.0), (carry * (1 - 2**-23), 1.0), (carry, 2.0)):
            weight = torch.zeros(1, 32)
            weight[0, 5] = -mantissa * 2.0**exponent
            assert grid.fit(weight).scale.item() == expected * 2.0**exponent / 4


def test_mxfp4_loses_no_more_than_saturation_costs(generator):
    weight = torch.randn(16, 256, generator=generator)
    absmax = weight.unflatten(-1, (8, 32)).abs().amax(-1, keepdim=True)
    # in scales: 5 becomes 4; up to 7 become 6, by the other rule up to 8
    for rule, bound in (("even", 1 / 5), ("floor", 1 / 4)):
        error = (rounded(weight, MXFP4Grid(rule)) - weight).unflatten(-1, (8, 32)).abs()
        assert (error <= bound * absmax * (1 + 1e-6)).all()


def test_mxfp4_stores_exponents_biased_by_127(generator):
    grid = MXFP4Grid()
    params = grid.fit(torch.full((1, 32), 4.0))
    assert params.scale.item() == 1
    assert grid.pack(torch.zeros(1, 32, dtype=torch.uint8), params)["scale_exponents"].tolist() == [[127]]


def test_nvfp4_scales_are_numbers_of_e4m3_over_one_of_the_tensor(generator):
    weight = torch.randn(8, 128, generator=generator)
    params = NVFP4Grid().fit(weight)
    assert params.global_scale.item() == pytest.approx(448 * 6 / float(weight.abs().max()))
    assert torch.equal(params.block_scale.to(torch.float8_e4m3fn).float(), params.block_scale)
    assert params.block_scale.max() == 448
    absmax = weight.unflatten(-1, (8, 16)).abs().amax(-1)
    # half a unit of a mantissa of 3 bits
    torch.testing.assert_close(NVFP4Grid().scale(params, 8) * 6, absmax, rtol=2**-4, atol=0)


def test_nvfp4_codes_stand_for_e2m1_times_both_scales(generator):
    grid, weight = NVFP4Grid(), torch.randn(3, 32, generator=generator)
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    decoded = grid.decode(codes, params)
    for row, column in ((0, 0), (1, 20), (2, 31)):
        code = int(codes[row, column])
        number = magnitudes[code & 7] * (-1 if code & 8 else 1)
        expected = number * float(params.block_scale[row, column // 16]) / float(params.global_scale)
        assert float(decoded[row, column]) == pytest.approx(expected, rel=2**-22)


def test_nvfp4_keeps_its_global_scale_where_blocks_are_fitted_again(generator):
    grid, weight = NVFP4Grid(), torch.randn(8, 64, generator=generator)
    params = grid.fit(weight)
    again = grid.refit(weight, params)
    assert all(torch.equal(*pair) for pair in zip(again, params))
    larger = grid.refit(3 * weight, params)
    assert torch.equal(larger.global_scale, params.global_scale)
    assert larger.block_scale.max() == 448  # saturated


def test_formats_stand_in_the_order_of_their_gaussian_errors(generator):
    weight = torch.randn(128, 2048, generator=generator)
    grids = (NormalFloatGrid(64), NVFP4Grid(), IntGrid(4, 128), MXFP4Grid())
    errors = [relative_error(weight, rounded(weight, grid), None) for grid in grids]
    assert errors == sorted(errors)


def test_rules_are_checked():
    for grid in (MXFP4Grid, NVFP4Grid):
        with pytest.raises(ValueError, match="group_size must be positive"):
            grid(group_size=0)
    with pytest.raises(ValueError, match="rule must be"):
        MXFP4Grid("ceil")
