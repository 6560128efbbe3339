"""Odd integers and balanced levels: what they cost, and the grids that they are equal to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.quant.grid import BinaryGrid, BipolarInt, BitBalance, IntGrid, IntParams, bits_per_weight
from tersor.quant.solver import relative_error

a_few = settings(max_examples=15, deadline=None, derandomize=True)


def rounded(weight, grid):
    params = grid.fit(weight)
    return grid.decode(grid.encode(weight, params), params)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_is_the_sum_of_its_signs(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    decoded = BipolarInt(bits).decode(codes, BipolarInt(bits).fit(torch.full((1, 2**bits), 2.0**bits - 1)))
    assert torch.equal(decoded, sum(((codes >> i & 1).float() * 2 - 1) * 2**i for i in range(bits)))
    assert not (decoded == 0).any()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 16])
def test_bipolar_integers_are_integers_with_a_zero_point_at_half_a_step(bits, group_size, generator):
    """The claim: the same levels and codes as the grid with steps of twice the scale, less (2^n - 1) / 2."""
    weight, grid = torch.randn(6, 96, generator=generator), BipolarInt(bits, group_size)
    scale = grid.fit(weight).scale
    same = IntParams(2 * scale, torch.full_like(scale, (2**bits - 1) / 2))
    other = IntGrid(bits, group_size, float_zero=True)
    # away from the middle between two levels, where a quotient's rounding decides
    steps = (weight / scale.float().repeat_interleave(96 // scale.shape[1], -1) + 2**bits - 1) / 2
    clear = (steps - steps.floor() - 0.5).abs() > 1e-4
    codes = grid.encode(weight, grid.fit(weight))
    assert torch.equal(codes[clear], other.encode(weight, same)[clear])
    assert clear.float().mean() > 0.99
    assert torch.equal(grid.decode(codes, grid.fit(weight)), other.decode(codes, same))


@pytest.mark.parametrize("bits", [2, 4, 8])
@a_few
@given(row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=16, max_size=16))
def test_no_weight_is_missed_by_more_than_the_scale(bits, row):
    weight, grid = torch.tensor([row]), BipolarInt(bits)
    scale = grid.fit(weight).scale.float()
    # the scale is a float16, rounded to nearest, and a small one has few bits
    slack = 2**bits * (2**-11 * scale + 2**-25)
    assert ((rounded(weight, grid) - weight).abs() <= scale + slack).all()


def test_one_bit_is_the_sign(generator):
    weight = torch.randn(4, 64, generator=generator)
    assert torch.equal(rounded(weight, BipolarInt(1, 16)), rounded(weight, BinaryGrid(16)))


def test_what_is_zero_does_not_stay_zero():
    """The pitfall that the paper names."""
    weight = torch.tensor([[0.0, 3.0, -3.0, 1.0]])
    assert rounded(weight, BipolarInt(2))[0, 0].abs() == 1
    assert rounded(weight, BitBalance())[0, 0] == 0


def test_planes_take_a_bit_per_weight_each():
    for bits in range(1, 9):
        assert bits_per_weight(BipolarInt(bits, 128), 64, 1024) == bits + 16 / 128
    # each group's planes are whole bytes
    assert bits_per_weight(BipolarInt(3, 12), 64, 96) == 3 * 16 / 12 + 16 / 12


@pytest.mark.parametrize(("levels", "stored"), [(3, 8 / 5), (5, 7 / 3)])
def test_a_level_more_is_paid_for(levels, stored):
    """Not 1 and 2 bits, as the paper's names say, but hardly more than the entropy of the levels."""
    width = 15 * 1024
    bits = bits_per_weight(BitBalance(levels), 8, width) - 16 / width
    assert bits == pytest.approx(stored, rel=1e-3)
    assert math.log2(levels) < bits < 1.02 * math.log2(levels)


@pytest.mark.parametrize("levels", [3, 5])
def test_digits_hold_the_codes_at_every_width(levels, generator):
    grid = BitBalance(levels)
    for width in range(1, 40):
        codes = torch.randint(0, levels, (3, width), dtype=torch.uint8, generator=generator)
        params = grid.fit(torch.ones(3, width))
        assert torch.equal(grid.unpack(grid.pack(codes, params), (3, width))[0], codes)


@pytest.mark.parametrize("levels", [3, 5])
def test_levels_are_balanced(levels, generator):
    weight = torch.randn(4, 64, generator=generator)
    assert torch.equal(rounded(-weight, BitBalance(levels)), -rounded(weight, BitBalance(levels)))


def test_balance_loses_less_than_two_bits_without(generator):
    """The paper's reason for the level: weights around zero lose it on a grid of four."""
    weight = torch.randn(64, 128, generator=generator)
    balanced, symmetric, asymmetric = (
        relative_error(weight, rounded(weight, grid), None)
        for grid in (BitBalance(5, 64), IntGrid(2, 64, symmetric=True), IntGrid(2, 64))
    )
    assert balanced < 0.7 * min(symmetric, asymmetric)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BipolarInt(0), "bits must be 1 to 8, got 0"),
        (lambda: BipolarInt(9), "bits must be 1 to 8, got 9"),
        (lambda: BipolarInt(4, 0), "group_size must be positive"),
        (lambda: BitBalance(4), "levels must be 3 or 5, got 4"),
        (lambda: BitBalance(5, -1), "group_size must be positive"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
