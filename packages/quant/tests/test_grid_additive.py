"""Sums of vectors from codebooks: what is stored, and how near sums come. What holds for every grid is tested with all."""

import itertools
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.grid import AdditiveGrid, AdditiveParams, bits_per_weight
from tersor.quant.grid.additive import kmeans_vectors, nearest
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN, relative_error


def random_params(grid: AdditiveGrid, rows: int, generator) -> AdditiveParams:
    shape = grid.num_codebooks, 2**grid.codebook_bits, grid.vector_size
    codebooks = torch.randn(shape, generator=generator).half()
    return AdditiveParams(codebooks, (torch.rand(rows, 1, generator=generator) + 0.5).half())


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_width_come_back_from_what_is_stored_and_multiply(bits, generator):
    for num_codebooks, vector_size, width in ((1, 4, 20), (3, 8, 40)):
        grid = AdditiveGrid(num_codebooks, bits, vector_size)
        shape = 5, width // vector_size, num_codebooks
        codes = torch.randint(2**bits, shape, generator=generator)
        codes[0] = 2**bits - 1
        codes = codes.to(torch.uint8 if bits <= 8 else torch.int32)
        params = random_params(grid, 5, generator)
        stored = grid.pack(codes, params)
        assert {name: (tuple(b.shape), b.dtype) for name, b in stored.items()} == grid.layout(5, width)
        again, again_params = grid.unpack(stored, (5, width))
        assert again.dtype == codes.dtype
        assert torch.equal(again, codes)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, again_params))
        x = torch.randn(3, width, generator=generator)
        y = grid.linear(x, *grid.prepare(stored, (5, width)))
        # sums of 40 products in another order
        torch.testing.assert_close(y, F.linear(x, grid.decode(codes, params)), rtol=1e-4, atol=1e-4)


def test_bits_are_those_of_codes_codebooks_and_scales():
    # Llama-2-7B: the up projection of AQLM's 1x16 and 2x8
    shape = 11008, 4096
    for grid, codes in ((AdditiveGrid(1, 16), 2), (AdditiveGrid(2, 8), 2), (AdditiveGrid(1, 12), 1.5)):
        codebooks = 16 * grid.num_codebooks * 2**grid.codebook_bits * 8 / (shape[0] * shape[1])
        assert bits_per_weight(grid, *shape) == codes + codebooks + 16 / 4096


def test_the_gradient_of_scales_and_codebooks_is_that_of_the_formula(generator):
    grid = AdditiveGrid(2, 3, 4)
    codes = torch.randint(8, (5, 6, 2), generator=generator).to(torch.uint8)
    params = AdditiveParams(*(p.double().requires_grad_() for p in random_params(grid, 5, generator)))
    direction = torch.randn(5, 24, generator=generator)
    (grid.decode(codes, params) * direction).sum().backward()
    expected = AdditiveParams(*(p.detach().requires_grad_() for p in params))
    plain = sum(expected.codebooks[m][codes[..., m].long()] for m in range(2))
    ((plain * expected.scale[..., None]).flatten(-2) * direction).sum().backward()
    for ours, theirs in zip(params, expected):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def brute_force(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """(m,): squared distance to the nearest of all sums."""
    picks = torch.tensor(list(itertools.product(range(codebooks.shape[1]), repeat=len(codebooks))))
    sums = sum(codebooks[m][picks[:, m]] for m in range(len(codebooks)))
    return torch.cdist(vectors.double(), torch.as_tensor(sums).double()).square().amin(-1)


def squared_distance(grid: AdditiveGrid, weight: Tensor, params: AdditiveParams) -> Tensor:
    decoded = grid.decode(grid.encode(weight, params), params)
    return (weight - decoded).double().view(-1, grid.vector_size).square().sum(-1)


@pytest.mark.parametrize(("num_codebooks", "bits"), [(1, 6), (2, 2), (2, 1), (3, 1)])
def test_no_sum_is_nearer_than_the_one_chosen_where_the_beam_holds_them_all(num_codebooks, bits, generator):
    """Always with one codebook; with more as long as the sums of all but the last are no more than five."""
    grid = AdditiveGrid(num_codebooks, bits, 4)
    params = random_params(grid, 16, generator)._replace(scale=torch.ones(16, 1).half())
    weight = 2 * torch.randn(16, 32, generator=generator)
    found = squared_distance(grid, weight, params)
    torch.testing.assert_close(found, brute_force(weight.view(-1, 4), params.codebooks.float()), rtol=1e-4, atol=1e-5)


def test_no_sum_is_further_than_that_of_nearest_vectors_one_after_the_other(generator):
    grid = AdditiveGrid(3, 4, 8)
    params = random_params(grid, 16, generator)._replace(scale=torch.ones(16, 1).half())
    weight = 2 * torch.randn(16, 32, generator=generator)
    left = weight.view(-1, 8)
    for codebook in params.codebooks.float():
        left = left - codebook[nearest(left, codebook)]
    assert (squared_distance(grid, weight, params) <= left.square().sum(-1) * (1 + 1e-5)).all()


def test_each_codebook_and_each_bit_lose_less(generator):
    weight = torch.randn(64, 64, generator=generator)
    lost = [
        relative_error(weight, grid.decode(*RTN().solve(weight, grid, None)), None)
        for grid in (AdditiveGrid(1, 4), AdditiveGrid(1, 6), AdditiveGrid(2, 6), AdditiveGrid(3, 6))
    ]
    assert all(after < before for before, after in itertools.pairwise(lost))


def test_kmeans_finds_clusters_and_points_that_no_vector_needs_do_no_harm(generator):
    """Whatever points it starts from: those without vectors move to where the error is. Of 32000 it looks at half."""
    centres = 10 * torch.randn(8, 4, generator=generator)
    for of_each, n in ((20, 16), (20, 200), (4000, 16)):
        vectors = centres.repeat(of_each, 1) + 0.01 * torch.randn(8 * of_each, 4, generator=generator)
        points = kmeans_vectors(vectors, n)
        assert points.shape == (n, 4)
        assert torch.cdist(vectors, points).amin(-1).max() < 0.1


def test_settings_survive_json():
    scheme = Scheme(AdditiveGrid(2, 12, 16))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_layers_store_it(generator):
    grid, linear = AdditiveGrid(2, 4), nn.Linear(32, 8)
    layer = QuantizedLinear.from_linear(linear, Scheme(grid), grid.pack(*RTN().solve(linear.weight.data, grid, None)))
    assert 8 * layer.nbytes / 256 == bits_per_weight(grid, 8, 32)
    x = torch.randn(3, 32, generator=generator)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_vectors_must_divide_the_width():
    with pytest.raises(ValueError, match="in = 100 is not a multiple of vector_size = 8; use vector_size = 10"):
        AdditiveGrid().check(4, 100)


@pytest.mark.parametrize("settings", [{"num_codebooks": 0}, {"codebook_bits": 17}, {"vector_size": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdditiveGrid(**settings)
