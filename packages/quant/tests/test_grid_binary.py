"""BinaryGrid: signs, scales, means."""

import torch

from tersor.quant.grid import BinaryGrid, bits_per_weight


def test_bits_are_one_and_a_float16_or_two_per_group():
    assert bits_per_weight(BinaryGrid(128), 16, 1024) == 1 + 16 / 128
    assert bits_per_weight(BinaryGrid(128, centred=True), 16, 1024) == 1 + 32 / 128


def test_levels_are_the_mean_plus_and_minus_the_scale(generator):
    weight = torch.randn(4, 64, generator=generator) + 0.5
    for centred in (False, True):
        grid = BinaryGrid(32, centred)
        params = grid.fit(weight)
        scale, mean = (p.float()[..., None] for p in params)
        grouped = weight.unflatten(-1, (2, 32))
        if centred:
            torch.testing.assert_close(mean, grouped.mean(-1, keepdim=True), rtol=2**-11, atol=1e-7)
        else:
            assert (mean == 0).all()
        expected = torch.where(grouped >= mean, mean + scale, mean - scale).flatten(-2)
        assert torch.equal(grid.decode(grid.encode(weight, params), params), expected)


def test_no_other_scale_loses_less_with_these_signs(generator):
    weight = torch.randn(8, 64, generator=generator) + 0.3
    for centred in (False, True):
        grid = BinaryGrid(64, centred)
        params = grid.fit(weight)
        codes = grid.encode(weight, params)

        def loss(factor, grid=grid, params=params, codes=codes):
            scaled = params._replace(scale=params.scale.float() * factor)
            return (grid.decode(codes, scaled) - weight).square().sum(-1)

        # 1 +- 1/100 is more than a float16 was rounded by
        assert (loss(1.0) < loss(0.99)).all()
        assert (loss(1.0) < loss(1.01)).all()


def test_what_is_at_the_mean_is_above_it():
    grid, weight = BinaryGrid(None), torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert grid.encode(weight, grid.fit(weight)).tolist() == [[1, 1, 1, 0]]


def test_a_constant_group_is_kept():
    weight = torch.full((2, 32), -0.75)
    for centred in (False, True):
        grid = BinaryGrid(16, centred)
        params = grid.fit(weight)
        codes = grid.encode(weight, params)
        assert torch.equal(grid.decode(codes, params), weight)
        y = grid.linear(torch.ones(32), *grid.prepare(grid.pack(codes, params), (2, 32)))
        assert y.tolist() == [-24, -24]
