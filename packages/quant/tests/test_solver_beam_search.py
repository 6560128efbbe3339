"""Beam search over codes: what it may never lose, and the limit in which it finds the best codes."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tersor.quant.calibration import SecondMoments
from tersor.quant.grid import AdditiveGrid, AdditiveParams, IntGrid
from tersor.quant.solver import RTN, BeamSearch, relative_error


@pytest.fixture
def weight(generator) -> Tensor:
    return torch.randn(32, 32, generator=generator)


@pytest.fixture
def hessian(generator) -> Tensor:
    """Second moments of correlated inputs."""
    x = torch.randn(128, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return x.T @ x / len(x)


def row_errors(weight: Tensor, decoded: Tensor, H: Tensor) -> Tensor:
    difference = (weight - decoded).double()
    return ((difference @ H.double()) * difference).sum(-1)


@pytest.mark.parametrize("grid", [AdditiveGrid(1, 4, 4), AdditiveGrid(2, 3, 8), AdditiveGrid(1, 9, 8)], ids=str)
@pytest.mark.parametrize("beam", [1, 3])
def test_a_sweep_raises_the_error_of_no_row(grid, beam, weight, hessian, generator):
    size = grid.num_codebooks, 2**grid.codebook_bits, grid.vector_size
    params = AdditiveParams(torch.randn(size, generator=generator), torch.ones(32, 1))
    shape = 32, 32 // grid.vector_size, grid.num_codebooks
    anything = torch.randint(2**grid.codebook_bits, shape, generator=generator)
    for codes in (grid.encode(weight, params), anything.to(grid.encode(weight, params).dtype)):
        new = BeamSearch(beam).sweep(weight, grid, codes, params, hessian)
        assert new.dtype == codes.dtype
        before, after = (row_errors(weight, grid.decode(c, params), hessian) for c in (codes, new))
        # compared in float32
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < 0.95 * before.sum()


def test_a_beam_that_holds_all_codes_finds_the_best(hessian, generator):
    """8 inputs in two vectors of 4 codes: a beam of 4 forgets nothing before the last one."""
    grid, weight, H = AdditiveGrid(1, 2, 4), torch.randn(16, 8, generator=generator), hessian[:8, :8]
    params = AdditiveParams(*(p.float() for p in grid.fit(weight)))
    found = BeamSearch(beam=4).sweep(weight, grid, grid.encode(weight, params), params, H)
    every = torch.tensor(list(itertools.product(range(4), repeat=2)), dtype=torch.uint8)
    errors = torch.stack([row_errors(weight, grid.decode(c.expand(16, 2)[..., None], params), H) for c in every])
    torch.testing.assert_close(row_errors(weight, grid.decode(found, params), H), errors.amin(0), rtol=1e-5, atol=1e-6)


def test_where_inputs_are_uncorrelated_and_equal_it_is_the_nearest_vector(weight):
    grid = AdditiveGrid(1, 5, 4)
    params = AdditiveParams(*(p.float() for p in grid.fit(weight)))
    codes = torch.zeros(32, 8, 1, dtype=torch.uint8)
    found = BeamSearch(beam=1).sweep(weight, grid, codes, params, torch.eye(32))
    assert torch.equal(found, grid.encode(weight, params))


@pytest.mark.parametrize("grid", [AdditiveGrid(1, 3, 4), AdditiveGrid(2, 2, 8)], ids=str)
def test_without_codes_to_change_it_is_least_squares(grid, weight, hessian, monkeypatch):
    """After steps enough no codebooks are better for these codes and scales."""
    monkeypatch.setattr(BeamSearch, "sweep", lambda self, weight, grid, codes, params, H: codes)
    start = grid.fit(weight)
    codes = grid.encode(weight, start)
    found = BeamSearch(tolerance=1e-6, steps=50, max_turns=50).solve(weight, grid, hessian).params
    # what is decoded, as a matrix (out, in, numbers) on the numbers in the codebooks
    units = torch.eye(start.codebooks.numel()).view(-1, *start.codebooks.shape)
    matrix = torch.stack([grid.decode(codes, AdditiveParams(unit, found.scale)) for unit in units], -1)
    root = torch.linalg.cholesky(hessian.double())
    A, b = (root.T @ matrix.double()).flatten(0, 1), (weight.double() @ root).flatten()
    least = (A @ torch.linalg.lstsq(A, b, driver="gelsd").solution - b).square().sum()
    assert least <= row_errors(weight, grid.decode(codes, found), hessian).sum() < 1.001 * least


@pytest.mark.parametrize("grid", [AdditiveGrid(1, 5, 4), AdditiveGrid(2, 4, 8)], ids=str)
def test_it_loses_less_than_the_nearest_vectors_and_more_turns_lose_less_still(grid, weight, hessian):
    solvers = [RTN(), BeamSearch(max_turns=1), BeamSearch(tolerance=1e-3)]
    lost = [relative_error(weight, grid.decode(*solver.solve(weight, grid, hessian)), hessian) for solver in solvers]
    assert lost[1] < 0.7 * lost[0]
    assert lost[2] < lost[1]


def test_parameters_are_as_they_are_stored(weight, hessian):
    grid = AdditiveGrid(2, 3, 8)
    codes, params = BeamSearch(max_turns=2).solve(weight, grid, hessian)
    again, stored = grid.unpack(grid.pack(codes, params), (32, 32))
    assert torch.equal(codes, again)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, stored))


def test_large_and_small_units_give_the_same_codes(weight, hessian):
    """Powers of two of the inputs and of the weights."""
    grid, solver = AdditiveGrid(1, 4, 8), BeamSearch(max_turns=2)
    codes, _ = solver.solve(weight, grid, hessian)
    assert torch.equal(solver.solve(weight / 64, grid, 2**20 * hessian).codes, codes)


def test_other_grids_and_missing_data_are_refused(weight, hessian):
    with pytest.raises(TypeError, match="BeamSearch.*IntGrid.*AdditiveGrid"):
        BeamSearch().solve(weight, IntGrid(4, 32), hessian)
    with pytest.raises(ValueError, match="calibration"):
        BeamSearch().solve(weight, AdditiveGrid(), None)


@pytest.mark.parametrize("settings", [{"beam": 0}, {"tolerance": 0.0}, {"max_turns": 0}, {"steps": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BeamSearch(**settings)


def test_on_a_trained_layer_it_loses_less_than_the_nearest_vectors(zoo, held_out_text, tiny_lm_tokenizer):
    """The first q projection, at 2 bits for codes, on 8 x 128 tokens."""
    model = zoo.load_model("tiny-lm")
    ids = tiny_lm_tokenizer(held_out_text[:8_000], return_tensors="pt").input_ids[0, : 8 * 128].view(8, 128)
    layer: nn.Linear = model.model.layers[0].self_attn.q_proj
    moments = SecondMoments(layer.in_features)
    layer.register_forward_pre_hook(lambda _, args: moments.update(args[0].flatten(0, 1)))
    with torch.no_grad():
        model.model(ids)
    grid, W, H = AdditiveGrid(2, 8), layer.weight.detach(), moments.mean.float()
    lost = [
        relative_error(W, grid.decode(*solver.solve(W, grid, H)), H) for solver in (RTN(), BeamSearch(1, max_turns=2))
    ]
    assert lost[1] < 0.6 * lost[0]
