"""FloatGrid: the formats' own numbers, and who shares a scale."""

import math

import pytest
import torch

from tersor.quant.grid import FloatGrid, ScaleParams, bits_per_weight
from tersor.quant.grid.float import FORMATS, numbers

every_format = pytest.mark.parametrize("name", FORMATS)
ONE = ScaleParams(torch.ones(1, 1))
OF_TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
of_torch = pytest.mark.parametrize(("name", "dtype"), OF_TORCH.items())


@of_torch
def test_every_code_means_what_it_means_to_torch(name, dtype):
    codes = torch.arange(256).to(torch.uint8)
    theirs = codes.view(dtype).float()
    finite = theirs.isfinite()
    ours = FloatGrid(name).decode(codes[None], ONE)[0]
    assert torch.equal(ours[finite], theirs[finite])
    assert torch.equal(ours.signbit()[finite], theirs.signbit()[finite])
    # codes of infinity and NaN
    assert ours[~finite].isnan().all()
    assert torch.equal(FloatGrid(name).encode(theirs[finite][None], ONE)[0], codes[finite])


@of_torch
def test_numbers_are_rounded_as_torch_casts_them(name, dtype, generator):
    largest = FORMATS[name].largest
    values = torch.randn(4096, generator=generator) * torch.randn(4096, generator=generator).mul(4).exp()
    levels = torch.tensor(sorted(number for number in numbers(FORMATS[name]) if number == number))
    ties = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([values, ties, ties.nextafter(levels[1:]), ties.nextafter(levels[:-1])]).clamp(-largest, largest)
    assert torch.equal(FloatGrid(name).encode(values[None], ONE)[0], values.to(dtype).view(torch.uint8))


def test_e2m1_has_eight_magnitudes_and_the_cut_points_of_ties_to_even():
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert numbers(FORMATS["e2m1"]) == (*magnitudes, *(-m for m in magnitudes))
    cuts = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 100.0]])
    for sign in (1, -1):
        rounded = FloatGrid("e2m1").decode(FloatGrid("e2m1").encode(sign * cuts, ONE), ONE)
        assert (sign * rounded).tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, 6]]


@every_format
def test_numbers_lie_as_the_format_says(name):
    form = FORMATS[name]
    positive = [number for number in numbers(form)[: 2 ** (form.bits - 1)] if number == number]
    assert positive == sorted(set(positive))
    assert (positive[0], positive[-1]) == (0, form.largest)
    for number in positive[1:]:
        # as many steps of the mantissa as it has bits, and no more below the smallest exponent
        exponent = max(math.floor(math.log2(number)), form.smallest_exponent)
        assert (number / 2.0 ** (exponent - form.mantissa_bits)).is_integer()


@every_format
def test_the_largest_weight_lands_on_the_largest_number(name, generator):
    weight = torch.randn(5, 64, generator=generator)
    grid = FloatGrid(name, 16)
    params = grid.fit(weight)
    decoded = grid.decode(grid.encode(weight, params), params)
    absmax = weight.unflatten(-1, (4, 16)).abs().amax(-1)
    # a scale is a float16
    torch.testing.assert_close(decoded.unflatten(-1, (4, 16)).abs().amax(-1), absmax, rtol=2**-11, atol=0)


@every_format
def test_relative_errors_are_half_a_unit_of_the_mantissa(name, generator):
    form = FORMATS[name]
    weight = torch.rand(4, 64, generator=generator) + 1
    grid = FloatGrid(name, 16)
    params = grid.fit(weight)
    error = (grid.decode(grid.encode(weight, params), params) - weight).abs() / weight
    assert error.max() <= 2.0 ** -(form.mantissa_bits + 1) * (1 + 2**-10)


def test_scales_are_shared_by_a_tensor_a_row_a_group_or_a_block(generator):
    weight = torch.randn(300, 256, generator=generator)
    absmax = weight.abs()
    for grid, expected in (
        (FloatGrid("e4m3", None, None), absmax.amax().view(1, 1)),
        (FloatGrid("e4m3"), absmax.amax(1, keepdim=True)),
        (FloatGrid("e4m3", 128), absmax.unflatten(1, (2, 128)).amax(2)),
        # the last block has 44 rows
        (
            FloatGrid("e4m3", 128, 128),
            torch.stack([part.unflatten(1, (2, 128)).amax((0, 2)) for part in absmax.split(128)]),
        ),
    ):
        params = grid.fit(weight)
        torch.testing.assert_close(params.scale, expected / 448, rtol=2**-11, atol=0)
        assert bits_per_weight(grid, 300, 256) == 8 + 16 * expected.numel() / weight.numel()
        decoded = grid.decode(grid.encode(weight, params), params)
        # 2^-4: half a unit of a mantissa of 3 bits; below the smallest exponent, -6, half a step of 2^-9
        step = 2.0**-10 * params.scale.max()
        assert ((decoded - weight).abs() <= (2**-4 * weight.abs()).clamp(min=step) * 1.001).all()


def test_small_weights_keep_the_digits_of_their_scale(generator):
    weight = torch.randn(4, 64, generator=generator)
    for name in FORMATS:
        scale, smaller = (FloatGrid(name).fit(weight * factor).scale for factor in (1, 2.0**-12))
        assert torch.equal(smaller, scale * 2.0**-12)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="format must be one of e4m3, e5m2, e2m1, e2m3, e3m2, got 'e3m4'"):
        FloatGrid("e3m4")
    with pytest.raises(ValueError, match="rows must be positive or None"):
        FloatGrid(rows=0)
