"""ClipSearch: never worse than rounding in its own measure, and the known errors on Gaussian weights."""

import pytest
import torch

from tersor.quant.grid import BilevelInt, FloatGrid, IntGrid, NormalFloatGrid, NVFP4Grid
from tersor.quant.solver import GPTQ, RTN, ClipSearch, relative_error

METRICS = ("weight", "diagonal", "outputs")
GRIDS = [IntGrid(3, 16), IntGrid(2, None), IntGrid(4, 16, symmetric=True), NormalFloatGrid(16), NVFP4Grid(16)]


def moments(in_features, generator):
    x = torch.randn(4 * in_features, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    return (x.T @ x).double() / len(x)


def loss(metric, error, H):
    """Of each row."""
    if metric == "weight":
        return error.abs().pow(2.4).sum(-1)
    return error.square() @ H.diagonal() if metric == "diagonal" else (error @ H * error).sum(-1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_row_loses_more_than_by_rounding_to_nearest(metric, grid, generator):
    weight, H = torch.randn(16, 64, generator=generator), moments(64, generator)
    errors = [
        (weight - grid.decode(*solver.solve(weight, grid, H))).double()
        for solver in (ClipSearch(metric, steps=20), RTN())
    ]
    ours, nearest = (loss(metric, error, H) for error in errors)
    assert (ours <= nearest * (1 + 1e-5)).all()  # sums in float32
    assert ours.sum() < 0.95 * nearest.sum()


def test_a_range_that_loses_nothing_is_not_shrunk(generator):
    grid = IntGrid(4, 16)
    weight = grid.decode(*RTN().solve(torch.randn(4, 64, generator=generator), grid, None))
    for metric in METRICS:
        codes, params = ClipSearch(metric).solve(weight, grid, moments(64, generator))
        assert torch.equal(grid.decode(codes, params), weight)


def test_with_uncorrelated_inputs_of_one_size_the_two_measures_by_data_are_one(generator):
    weight = torch.randn(8, 64, generator=generator)
    for grid in GRIDS:
        diagonal, outputs = (ClipSearch(m, steps=20).solve(weight, grid, torch.eye(64)) for m in METRICS[1:])
        assert torch.equal(diagonal.codes, outputs.codes)


@pytest.mark.parametrize(
    ("grid", "before", "after"),
    [
        (IntGrid(4, 128, symmetric=True), 0.01232, 0.01024),
        (IntGrid(3, 128), 0.0466, 0.0348),
        (IntGrid(2, 64), 0.209, 0.126),
    ],
    ids=str,
)
def test_errors_of_gaussian_weights_fall_as_they_are_known_to(grid, before, after, generator):
    weight = torch.randn(64, 2048, generator=generator)
    nearest, clipped = (
        relative_error(weight, grid.decode(*solver.solve(weight, grid, None)), None) for solver in (RTN(), ClipSearch())
    )
    assert nearest == pytest.approx(before, rel=0.03)
    assert clipped == pytest.approx(after, rel=0.03)


@pytest.mark.parametrize("order", ["act", "group"])
@pytest.mark.parametrize("metric", METRICS)
def test_gptq_without_correlations_is_clip_search(order, metric, generator):
    weight, H = torch.randn(6, 64, generator=generator), torch.diag(torch.rand(64, generator=generator) + 0.1)
    for grid in (IntGrid(3, 16), NVFP4Grid(16)):
        clip = ClipSearch(metric, steps=20)
        alone, together = clip.solve(weight, grid, H), GPTQ(order=order, clip=clip).solve(weight, grid, H)
        assert torch.equal(together.codes, alone.codes)
        assert all(torch.equal(a, b) for a, b in zip(together.params, alone.params))


@pytest.mark.parametrize("grid", [FloatGrid("e2m1", 16, rows=None), FloatGrid("e2m1", 16, rows=4)], ids=str)
def test_ranges_that_rows_share_are_none_to_search(grid, generator):
    with pytest.raises(TypeError, match=r"rows share the ranges of FloatGrid.*; use RTN\(\)"):
        ClipSearch().solve(torch.randn(16, 64, generator=generator), grid, None)


def test_it_refuses_what_it_cannot_search(generator):
    weight = torch.randn(16, 64, generator=generator)
    with pytest.raises(TypeError, match="BilevelInt"):
        ClipSearch().solve(weight, BilevelInt(), None)
    for metric in METRICS[1:]:
        with pytest.raises(ValueError, match="needs calibration data"):
            ClipSearch(metric).solve(weight, IntGrid(), None)


@pytest.mark.parametrize("setting", [{"metric": "l2"}, {"smallest": 0.0}, {"smallest": 1.0}, {"steps": 0}], ids=str)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ClipSearch(**setting)
