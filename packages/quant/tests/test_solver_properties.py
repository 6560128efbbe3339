"""What holds for every solver on every grid that it takes."""

from dataclasses import replace

import pytest
import torch

from tersor.quant.grid import (
    BilevelInt,
    BinaryGrid,
    DoubleNormalFloatGrid,
    FloatGrid,
    GaussianGrid,
    IntGrid,
    KMeansGrid,
    MXFP4Grid,
    NormalFloatGrid,
    NVFP4Grid,
)
from tersor.quant.solver import GPTQ, HQQ, RTN, ClipSearch, CoordinateDescent, LearnedRounding, SpQR

CLIP = ClipSearch(steps=10)
INTEGERS = [IntGrid(3, 16), IntGrid(4, None, symmetric=True), IntGrid(2, 16, float_zero=True)]
GRIDS = [
    *INTEGERS,
    NormalFloatGrid(16),
    DoubleNormalFloatGrid(16),
    FloatGrid("e2m1", 16),
    MXFP4Grid(),
    NVFP4Grid(),
    GaussianGrid(8, 16),
    KMeansGrid(3),
    BinaryGrid(16),
    BilevelInt(),
]
BY_DATA = [GPTQ(), GPTQ(order="group"), GPTQ(clip=CLIP), GPTQ(order="group", clip=CLIP), CoordinateDescent(), SpQR(0.5)]
EVERYWHERE = [RTN(), CLIP, replace(CLIP, metric="outputs"), *BY_DATA, CoordinateDescent(RTN())]
PAIRS = [(solver, grid) for solver in EVERYWHERE for grid in GRIDS] + [
    *((LearnedRounding(steps=20, scale_rate=1e-3), grid) for grid in INTEGERS),
    (HQQ(), INTEGERS[-1]),
]
PAIRS = [(s, g) for s, g in PAIRS if not (isinstance(g, BilevelInt) and "ClipSearch" in str(s))]
every_pair = pytest.mark.parametrize(("solver", "grid"), PAIRS, ids=str)


@pytest.fixture
def layer(generator):
    """A weight, and second moments of correlated inputs."""
    x = torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return torch.randn(32, 32, generator=generator), (x.T @ x).double() / len(x)


@every_pair
def test_codes_fit_the_grid_and_the_same_input_gives_the_same_bits(solver, grid, layer):
    weight, H = layer
    before = weight.clone(), H.clone()
    first, second = solver.solve(weight, grid, H), solver.solve(weight, grid, H)
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])
    assert torch.equal(first.codes, second.codes)
    assert all(torch.equal(a, b) for a, b in zip(first.params, second.params))
    stored = grid.pack(first.codes, first.params)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == grid.layout(32, 32)
    assert torch.equal(grid.unpack(stored, (32, 32))[0], first.codes)


@pytest.mark.parametrize(
    ("solver", "grid"), [(s, g) for s, g in PAIRS if g.per_row and not isinstance(s, SpQR)], ids=str
)
def test_rows_do_not_see_each_other(solver, grid, layer):
    """Unless the grid, or the threshold of outliers, ties them together."""
    # float64: sums over fewer rows, in another order, then hardly ever turn a rounding around
    weight, H = layer[0].double(), layer[1]
    together = solver.solve(weight, grid, H)
    apart = solver.solve(weight[:16], grid, H)
    assert torch.equal(apart.codes, together.codes[:16])
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(apart.params, together.params))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("solver", [*BY_DATA[:2], *BY_DATA[4:], CoordinateDescent(RTN())], ids=str)
def test_without_correlations_nothing_is_better_than_rounding_to_nearest(solver, grid, generator):
    weight, H = torch.randn(32, 32, generator=generator), torch.diag(torch.rand(32, generator=generator) + 0.1)
    solver = replace(solver, tau=float("inf")) if isinstance(solver, SpQR) else solver
    nearest = RTN().solve(weight, grid, None)
    codes, params, *_ = solver.solve(weight, grid, H)
    assert torch.equal(codes, nearest.codes)
    assert all(torch.equal(a, b) for a, b in zip(params, nearest.params))


@every_pair
def test_weights_of_inputs_that_are_always_zero_stay_near_theirs(solver, grid, layer):
    weight, H = layer
    dead = [0, 5, 31]
    H[dead], H[:, dead] = 0, 0
    codes, params, *rest = solver.solve(weight, grid, H)
    decoded = grid.decode(codes, params) + (rest[0] if rest else 0)
    nearest = grid.decode(grid.encode(weight, params), params)
    assert decoded.isfinite().all()
    if not rest and not isinstance(solver, LearnedRounding | HQQ):
        assert torch.equal(decoded[:, dead], nearest[:, dead])


@pytest.mark.parametrize("solver", [*BY_DATA, LearnedRounding()], ids=str)
def test_solvers_that_learn_say_that_they_need_data(solver):
    with pytest.raises(ValueError, match="needs calibration data"):
        solver.solve(torch.randn(16, 64), IntGrid(4, 16), None)
