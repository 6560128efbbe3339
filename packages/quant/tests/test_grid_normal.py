"""NF4, and its scales quantised once more."""

from statistics import NormalDist

import pytest
import torch

from tersor.quant.grid import DoubleNormalFloatGrid, NormalFloatGrid, bits_per_weight
from tersor.quant.grid.normal import NF4, dynamic_numbers


def test_levels_are_quantiles_of_the_normal_distribution():
    """arXiv:2305.14314, section 3: eight above zero, seven below, over the largest."""
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2

    def quantiles(count: int) -> list[float]:
        steps = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1].tolist()
        return [NormalDist().inv_cdf(p) for p in steps]

    above, below = quantiles(8), quantiles(7)
    levels = sorted([0.0, *above, *(-q for q in below)])
    assert [level / above[0] for level in levels] == pytest.approx(NF4, abs=1e-6)


def test_dynamic_numbers_are_the_middles_of_ever_finer_parts_of_ever_larger_decades():
    numbers = dynamic_numbers()
    assert len(set(numbers)) == 256
    assert (numbers[-1], numbers[127]) == (1.0, 0.0)
    assert numbers[:127] == tuple(-number for number in numbers[254:127:-1])
    for k in range(7):
        decade = [number for number in numbers if 10.0 ** -(k + 1) < number < 10.0**-k]
        assert len(decade) == 2 ** (6 - k)
        assert sum(decade) / len(decade) == pytest.approx(0.55 * 10.0**-k)


def test_weights_are_those_of_bitsandbytes(generator):
    """The same codes, of which it has the first in the high half of a byte, and the same largest weights."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight, grid = torch.randn(64, 256, generator=generator), NormalFloatGrid(64)
    # scales that float16 holds
    largest = grid.fit(weight).scale.float()
    grouped = weight.unflatten(-1, (4, 64))
    weight = (grouped / grouped.abs().amax(-1, keepdim=True) * largest[..., None]).flatten(-2)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).view(64, 256)
    params = grid.fit(weight)
    assert torch.equal(params.scale.float(), state.absmax.view(64, 4))
    assert torch.equal(grid.decode(codes, params), functional.dequantize_4bit(packed, state))
    assert (grid.encode(weight, params) == codes).float().mean() > 0.999  # but for ties


def test_bits_are_those_of_the_paper():
    assert bits_per_weight(NormalFloatGrid(64), 1024, 1024) == 4 + 16 / 64
    bits = bits_per_weight(DoubleNormalFloatGrid(64), 1024, 1024)
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2
    assert round(bits, 3) == 4.127


def test_quantised_scales_are_off_by_little(generator):
    weight = torch.randn(64, 1024, generator=generator) * torch.rand(64, 1, generator=generator)
    grid = DoubleNormalFloatGrid(64)
    params = grid.fit(weight)
    absmax = weight.unflatten(-1, (16, 64)).abs().amax(-1)
    # half a part of the largest decade: 0.9 / 64 / 2; the largest number but one is that far from 1, too
    assert ((grid.scale(params, 64) - absmax).abs() <= 0.9 / 128 * params.spread * (1 + 1e-3)).all()
    assert params.mean.item() == pytest.approx(float(absmax.mean()))


def test_runs_of_scales_go_on_over_rows(generator):
    weight = torch.randn(6, 320, generator=generator) * torch.arange(1, 7)[:, None]
    params = DoubleNormalFloatGrid(64, 8).fit(weight)
    runs = params.spread.flatten().split(8)
    assert all((run == run[0]).all() for run in runs)
    assert params.spread.unique().numel() == len(runs) == 4


def test_runs_keep_their_spread_where_scales_are_fitted_again(generator):
    grid, weight = DoubleNormalFloatGrid(32, 8), torch.randn(4, 64, generator=generator)
    params = grid.fit(weight)
    assert all(torch.equal(*pair) for pair in zip(grid.refit(weight, params), params))
    other = grid.refit(0.5 * weight, params)
    assert torch.equal(other.spread, params.spread)
    assert torch.equal(other.mean, params.mean)
    assert not torch.equal(other.code, params.code)
