"""Gaussian grids and k-means: codebooks of least squared error."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from tersor.kernels import hadamard
from tersor.quant.grid import (
    GaussianGrid,
    GaussianPairGrid,
    IntGrid,
    KMeansGrid,
    MXFP4Grid,
    NormalFloatGrid,
    bits_per_weight,
)
from tersor.quant.grid import gaussian_tables as tables
from tersor.quant.grid.gaussian import normal_points
from tersor.quant.grid.lloyd import kmeans, normal_levels
from tersor.quant.solver import relative_error


def rounded(weight, grid):
    params = grid.fit(weight)
    return grid.decode(grid.encode(weight, params), params)


def error_of(grid, weight) -> float:
    return relative_error(weight, rounded(weight, grid), None)


def test_bits_are_those_of_the_codes_and_a_float16_per_group():
    assert bits_per_weight(GaussianGrid(16, 256), 64, 1024) == 4 + 16 / 256
    for n, bits in ((16, 2), (32, 2.5), (64, 3), (128, 3.5), (256, 4)):
        assert bits_per_weight(GaussianPairGrid(n, 128), 64, 1024) == bits + 16 / 128
    assert bits_per_weight(KMeansGrid(4), 64, 1024) == 4 + 16 * 16 / 1024
    assert bits_per_weight(KMeansGrid(3, per_tensor=True), 64, 1024) == 3 + 16 * 8 / (64 * 1024)


@pytest.mark.parametrize("n", [2, 4, 16, 256])
def test_normal_levels_are_the_means_of_what_is_nearest_to_them(n):
    normal, levels = NormalDist(), normal_levels(n)
    assert levels == tuple(sorted(levels))
    assert levels == tuple(-level for level in reversed(levels))
    cuts = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    for level, low, high in zip(levels[n // 2 :], cuts[n // 2 :], cuts[n // 2 + 1 :]):
        # by the lower tail, whose digits are not lost
        mass = normal.cdf(-low) - normal.cdf(-high)
        densities = [0.0 if math.isinf(cut) else normal.pdf(cut) for cut in (low, high)]
        assert level == pytest.approx((densities[0] - densities[1]) / mass, rel=1e-4)


@pytest.mark.parametrize("n", tables.SIZES)
def test_no_step_improves_the_stored_points(n, generator):
    samples, others = torch.randn(2, 2**16, 2, generator=generator)
    points = torch.tensor(normal_points(n))
    assert points.shape == (n, 2)
    assert tables.error(others, tables.lloyd(samples, points, 2)) > 0.998 * tables.error(others, points)


def test_stored_points_are_not_worse_than_computed_ones(generator):
    samples = torch.randn(2**17, 2, generator=generator)
    computed = tables.normal_points(16, starts=2, few=2**12, many=2**15)
    assert tables.error(samples, torch.tensor(normal_points(16))) < 1.002 * tables.error(samples, computed)
    assert torch.equal(tables.normal_points(16, starts=2, few=2**12, many=2**15), computed)


def test_pairs_become_their_nearest_points(generator):
    weight = torch.randn(3, 64, generator=generator)
    for n in tables.SIZES:
        grid = GaussianPairGrid(n, 32)
        params = grid.fit(weight)
        points = torch.tensor(normal_points(n))
        pairs = weight.view(3, 2, 16, 2) / params.scale.float()[..., None, None]
        distance = (pairs[..., None, :] - points).square().sum(-1)
        chosen = distance.take_along_dim(grid.encode(weight, params).view(3, 2, 16, 1).long(), -1)[..., 0]
        assert (chosen <= distance.amin(-1) + 1e-6).all()


def test_scales_are_root_mean_squares(generator):
    weight = torch.randn(4, 96, generator=generator)
    expected = weight.unflatten(-1, (3, 32)).square().mean(-1).sqrt()
    for grid in (GaussianGrid(16, 32), GaussianPairGrid(16, 32)):
        torch.testing.assert_close(grid.fit(weight).scale.float(), expected, rtol=2**-11, atol=0)


def test_after_a_hadamard_transform_the_error_does_not_depend_on_the_distribution(generator):
    """HIGGS (arXiv:2411.17525), section 4: for weights with heavy tails rounding to nearest loses half as much again."""
    group = 1024
    shape = (64, 2 * group)
    normal = torch.randn(shape, generator=generator)
    laplace = torch.rand(shape, generator=generator).log() * torch.randn(shape, generator=generator).sign()
    outliers = normal * torch.where(torch.rand(shape, generator=generator) < 0.01, 5.0, 1.0)
    signs = torch.randint(0, 2, (group,), generator=generator) * 2.0 - 1

    def turned(weight):
        return hadamard(weight.unflatten(-1, (2, group)) * signs, group).flatten(-2)

    for grid in (GaussianGrid(16, group), GaussianPairGrid(256, group)):
        expected = error_of(grid, turned(normal))
        for weight in (laplace, outliers):
            assert error_of(grid, turned(weight)) == pytest.approx(expected, rel=0.03)
    for weight in (laplace, outliers):
        assert error_of(IntGrid(4, 128), weight) > 1.5 * error_of(IntGrid(4, 128), normal)


def test_pairs_beat_nf4_on_normal_weights_and_single_levels_do_not(generator):
    weight = torch.randn(128, 2048, generator=generator)
    nf4 = error_of(NormalFloatGrid(64), weight)
    assert error_of(GaussianPairGrid(256, 128), weight) < nf4 < error_of(GaussianGrid(16, 128), weight)
    assert nf4 < error_of(MXFP4Grid(), weight)


def test_kmeans_of_few_distinct_values_is_exact():
    values = torch.tensor([[3.0, -1, 3, 0.5, -1, 0.5, 3, 3]])
    assert (rounded(values, KMeansGrid(2)) == values).all()


def test_kmeans_levels_are_the_means_of_what_is_nearest_to_them(generator):
    values, importance = torch.randn(5, 300, generator=generator), torch.rand(5, 300, generator=generator)
    levels = kmeans(values, 8, importance)
    assert (levels.diff() > 0).all()
    nearest = (values[..., None] - levels[:, None]).abs().argmin(-1)
    for row in range(5):
        for code in range(8):
            mine = nearest[row] == code
            mean = (values[row, mine] * importance[row, mine]).sum() / importance[row, mine].sum()
            assert float(levels[row, code]) == pytest.approx(float(mean), abs=1e-5)


def test_kmeans_loses_less_than_the_gaussian_grid_that_it_starts_from(generator):
    weight = torch.randn(16, 512, generator=generator)
    for bits in (2, 3, 4):
        assert error_of(KMeansGrid(bits), weight) < error_of(GaussianGrid(2**bits, None), weight)


def test_kmeans_spends_its_levels_on_columns_that_matter(generator):
    weight = torch.randn(16, 512, generator=generator)
    weight[:, 256:] *= 10
    grid, importance = KMeansGrid(3), torch.ones(512)
    importance[256:] = 1e-6
    params = grid.fit(weight, importance)
    error = (grid.decode(grid.encode(weight, params), params) - weight).square().sum(0)
    plain = (rounded(weight, grid) - weight).square().sum(0)
    assert error[:256].sum() < plain[:256].sum() / 4
    assert plain[256:].sum() < error[256:].sum()


def test_a_tensor_keeps_its_codebook_where_columns_are_fitted_again(generator):
    weight = torch.randn(4, 64, generator=generator)
    grid = KMeansGrid(3, per_tensor=True)
    params = grid.fit(weight)
    assert torch.equal(grid.refit(2 * weight, params).codebook, params.codebook)
    assert params.codebook.shape == (1, 1, 8)


@pytest.mark.parametrize(("kind", "n"), [(GaussianGrid, 3), (GaussianGrid, 512), (GaussianPairGrid, 8)])
def test_sizes_are_checked(kind, n):
    with pytest.raises(ValueError, match=f"n must be one of .*, got {n}"):
        kind(n)


def test_pairs_need_an_even_width():
    with pytest.raises(ValueError, match="group_size must be even"):
        GaussianPairGrid(16, 33)
    with pytest.raises(ValueError, match="in = 33 is odd.*use GaussianGrid"):
        GaussianPairGrid(16, None).check(4, 33)


def test_a_codebook_is_of_a_tensor_or_of_groups():
    with pytest.raises(ValueError, match="use group_size=None"):
        KMeansGrid(4, 32, per_tensor=True)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        KMeansGrid(9)
