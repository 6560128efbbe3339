"""MaskedBinary: its mask, its levels, its bits."""

import pytest
import torch

from tersor.quant.grid import BinaryGrid, IntGrid, MaskedBinary, bits_per_weight
from tersor.quant.solver import RTN, WeightedRTN, relative_error


def rounded(weight, grid, importance=None):
    params = grid.fit(weight, importance)
    return grid.decode(grid.encode(weight, params), params)


def test_a_layer_of_2048_inputs_takes_1_61_bits_and_its_vectors():
    layout = MaskedBinary().layout(2048, 2048)
    nbytes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in layout.items()}
    num_salient = round(0.2 * 2048)
    # rows begin with a byte of their own
    codes = -(-num_salient // 8) * 4 + -(-(2048 - num_salient) // 8)
    assert nbytes["integer_codes"] + nbytes["sign_codes"] == 2048 * codes
    assert nbytes["salient"] == 2048 // 8
    assert 8 * (2048 * codes + nbytes["salient"]) / 2048**2 == pytest.approx(1.61, abs=0.005)
    # of a row a scale of 16 bits, a zero point of 4, alpha and the mean; of a column a float16
    vectors = 2048 * (3 * 16 + 4) + (2048 - num_salient) * 16
    assert 8 * sum(nbytes.values()) == 8 * (2048 * codes + nbytes["salient"]) + vectors
    assert bits_per_weight(MaskedBinary(), 2048, 2048) < 1.65


def test_with_all_inputs_salient_it_is_rounding_to_integers(generator):
    weight, x = torch.randn(8, 96, generator=generator), torch.randn(3, 96, generator=generator)
    grid, plain = MaskedBinary(1.0), IntGrid(4, None)
    codes, params = RTN().solve(weight, grid, None)
    expected = plain.decode(*RTN().solve(weight, plain, None))
    assert torch.equal(grid.decode(codes, params), expected)
    stored = grid.pack(codes, params)
    assert {name: (tuple(b.shape), b.dtype) for name, b in stored.items()} == grid.layout(8, 96)
    assert torch.equal(grid.decode(*grid.unpack(stored, (8, 96))), expected)
    torch.testing.assert_close(grid.linear(x, *grid.prepare(stored, (8, 96))), x @ expected.T)


def test_the_most_important_inputs_are_integers_and_all_others_signs(generator):
    weight, importance = torch.randn(8, 40, generator=generator), torch.rand(40, generator=generator)
    decoded, chosen = rounded(weight, MaskedBinary(), importance), importance.topk(8).indices
    others = torch.ones(40, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(decoded[:, chosen], rounded(weight[:, chosen], MaskedBinary(1.0)))
    signs = BinaryGrid(None, centred=True)
    assert torch.equal(decoded[:, others], signs.decode(*RTN().solve(weight[:, others], signs, None)))


def test_no_other_alpha_loses_less_with_these_signs(generator):
    """mean |w - mean|, and not mean |w|, as the authors' code has it."""
    weight, grid = torch.randn(8, 80, generator=generator) + 0.4, MaskedBinary()
    params = grid.fit(weight)
    codes, others = grid.encode(weight, params), weight[:, ~params.salient[0]]
    best = (others - params.mean.float()).abs().mean(-1, keepdim=True)
    torch.testing.assert_close(params.alpha.float(), best, rtol=2**-11, atol=0)

    def loss(alpha):
        return (grid.decode(codes, params._replace(alpha=alpha)) - weight).square().sum(-1)

    assert (loss(best) < loss(1.01 * best)).all()
    assert (loss(best) < loss(0.99 * best)).all()
    assert (loss(best) < loss(others.abs().mean(-1, keepdim=True))).all()


def test_columns_multiply_the_signs_of_their_inputs_only(generator):
    weight, grid = torch.randn(8, 40, generator=generator), MaskedBinary()
    params = grid.fit(weight)
    codes, column = grid.encode(weight, params), torch.rand(1, 32, generator=generator).half()
    factor = torch.ones(40).masked_scatter(~params.salient[0], column.float())
    scaled = params._replace(column=column)
    assert torch.equal(grid.decode(codes, scaled), grid.decode(codes, params) * factor)
    assert torch.equal(grid.encode(grid.decode(codes, scaled), scaled), codes)
    x, stored = torch.randn(3, 40, generator=generator), grid.pack(codes, scaled)
    torch.testing.assert_close(grid.linear(x, *grid.prepare(stored, (8, 40))), x @ grid.decode(codes, scaled).T)


def test_the_inputs_of_the_calibration_data_are_a_better_mask_than_the_weights(generator):
    weight = torch.randn(64, 80, generator=generator)
    x = torch.randn(512, 80, generator=generator) * torch.logspace(-1, 1, 80)
    hessian, grid = x.T @ x / len(x), MaskedBinary()
    error = {
        s: relative_error(weight, grid.decode(*s.solve(weight, grid, hessian)), hessian) for s in (RTN(), WeightedRTN())
    }
    assert error[WeightedRTN()] < 0.5 * error[RTN()]
    assert WeightedRTN().solve(weight, grid, hessian).params.salient[0, -16:].all()


def test_what_does_not_suit_is_refused():
    with pytest.raises(ValueError, match="salient must be above 0 and at most 1, got 0"):
        MaskedBinary(0.0)
    with pytest.raises(ValueError, match="salient_bits must be 1 to 8, got 9"):
        MaskedBinary(salient_bits=9)
    with pytest.raises(ValueError, match=r"salient = 0.01 of in = 32 is no input; use salient = 0.031 or more"):
        MaskedBinary(0.01).check(8, 32)
