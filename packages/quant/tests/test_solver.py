"""Axis solver: what holds for every solver, then GPTQ against limits, bounds and a plain loop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.quant.grid import IntGrid, IntParams
from tersor.quant.solver import GPTQ, RTN, Result, relative_error

ORDERS = ("none", "act", "group")
GPTQS = [GPTQ(order=order) for order in ORDERS]
every_solver = pytest.mark.parametrize("solver", [RTN(), *GPTQS], ids=str)
every_order = pytest.mark.parametrize("order", ORDERS)
# float64: the ways to compute the same corrections then differ by far less than what turns a rounding around
EXACT = torch.float64


def correlated(in_features: int, generator: torch.Generator) -> Tensor:
    """Second moments like those of a model's activations: a few directions hold most of them, channels differ in size."""
    mix = torch.randn(in_features, in_features, generator=generator, dtype=EXACT)
    sizes = torch.logspace(-0.5, 0.5, in_features, dtype=EXACT)[torch.randperm(in_features, generator=generator)]
    spectrum = torch.logspace(0, -3, in_features, dtype=EXACT)
    return (mix * spectrum) @ mix.T * sizes.outer(sizes)


def objective(weight: Tensor, result: Result, grid: IntGrid, H: Tensor) -> Tensor:
    """Diagonal of (W - Q) H (W - Q)^T: the squared error of each row's output."""
    difference = weight.double() - grid.decode(*result).double()
    return (difference @ H * difference).sum(-1)


def damped(H: Tensor, damp: float = 0.01) -> Tensor:
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@every_solver
def test_codes_and_parameters_have_the_shapes_of_the_grid(solver, generator):
    weight, grid = torch.randn(6, 32, generator=generator), IntGrid(3, 8)
    codes, (scale, zero_point) = solver.solve(weight, grid, correlated(32, generator))
    assert (codes.shape, codes.dtype) == ((6, 32), torch.uint8)
    assert scale.shape == zero_point.shape == (6, 4)
    assert int(codes.max()) < 2**3


@every_solver
def test_rows_do_not_see_each_other(solver, generator):
    """The walk solves the layers that share an input as one tall weight."""
    weight, grid, H = torch.randn(8, 32, generator=generator, dtype=EXACT), IntGrid(3, 8), correlated(32, generator)
    together = solver.solve(weight, grid, H)
    for part, rows in ((solver.solve(weight[:3], grid, H), slice(3)), (solver.solve(weight[3:], grid, H), slice(3, 8))):
        assert torch.equal(part.codes, together.codes[rows])
        assert torch.equal(part.params.scale, together.params.scale[rows])


@every_solver
def test_the_weight_given_is_not_changed(solver, generator):
    weight, H = torch.randn(4, 16, generator=generator), correlated(16, generator)
    before = weight.clone(), H.clone()
    solver.solve(weight, IntGrid(2, 8), H)
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])


@every_solver
def test_the_same_input_gives_the_same_bits(solver, generator):
    weight, H = torch.randn(4, 64, generator=generator), correlated(64, generator)
    first, second = (solver.solve(weight, IntGrid(3, 16), H) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.params.scale, second.params.scale)


@every_order
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [8, None])
def test_without_correlations_gptq_is_rounding_to_nearest(order, symmetric, group_size, generator):
    weight, grid = torch.randn(6, 32, generator=generator), IntGrid(4, group_size, symmetric)
    nearest = RTN().solve(weight, grid, None)
    for diagonal in (torch.ones(32), torch.rand(32, generator=generator) + 0.1):
        codes, params = GPTQ(order=order).solve(weight, grid, torch.diag(diagonal))
        assert torch.equal(codes, nearest.codes)
        assert all(torch.equal(a, b) for a, b in zip(params, nearest.params))


def plain_columns(weight: Tensor, grid: IntGrid, H: Tensor, order: list[int], fit_first: bool) -> Result:
    """One column after the other as in the paper's section 3, the inverse of H reduced by each: no factor, no blocks."""
    W, inverse, row = weight.double().clone(), damped(H.double()).inverse(), replace(grid, group_size=None)
    width = grid.group_size or W.shape[1]
    scale, zero_point = grid.fit(weight)
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for step, j in enumerate(order):
        group = j // width
        if not fit_first and step % width == 0:
            fitted = row.fit(W[:, group * width : (group + 1) * width])
            scale[:, group : group + 1], zero_point[:, group : group + 1] = fitted
        params = IntParams(scale[:, group : group + 1], zero_point[:, group : group + 1])
        codes[:, j : j + 1] = row.encode(W[:, j : j + 1], params)
        error = (W[:, j] - row.decode(codes[:, j : j + 1], params)[:, 0]) / inverse[j, j]
        W -= error.outer(inverse[j])
        inverse -= inverse[:, j].outer(inverse[j]) / inverse[j, j]
    return Result(codes, IntParams(scale, zero_point))


@every_order
@pytest.mark.parametrize("grid", [IntGrid(3, 8), IntGrid(4, None, symmetric=True)], ids=str)
def test_gptq_equals_the_plain_column_loop(order, grid, generator):
    weight, H = torch.randn(5, 40, generator=generator, dtype=EXACT), correlated(40, generator)
    importance = H.diagonal()
    columns = list(range(40))
    if order == "act":
        columns.sort(key=lambda j: -importance[j])
    if order == "group":
        width = grid.group_size or 40
        groups = [sorted(columns[g : g + width], key=lambda j: -importance[j]) for g in range(0, 40, width)]
        columns = [j for group in sorted(groups, key=lambda group: -importance[group[0]]) for j in group]
    ours = GPTQ(order=order, block_size=16).solve(weight, grid, H)
    plain = plain_columns(weight, grid, H, columns, fit_first=order == "act")
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.params.scale, plain.params.scale)


@every_order
@pytest.mark.parametrize("group_size", [24, None])  # 24: groups and blocks end in different places
def test_the_block_size_does_not_change_the_result(order, group_size, generator):
    weight, H = torch.randn(5, 96, generator=generator, dtype=EXACT), correlated(96, generator)
    results = [
        GPTQ(order=order, block_size=size).solve(weight, IntGrid(3, group_size), H) for size in (1, 7, 32, 96, 128)
    ]
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        assert torch.equal(result.params.scale, results[0].params.scale)


@every_order
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_has_much_less_output_error_than_rounding_on_correlated_inputs(order, bits, generator):
    ratios = []
    for _ in range(6):
        weight, H, grid = torch.randn(16, 64, generator=generator), correlated(64, generator), IntGrid(bits, 16)
        nearest = objective(weight, RTN().solve(weight, grid, None), grid, H).sum()
        ratios.append(objective(weight, GPTQ(order=order).solve(weight, grid, H), grid, H).sum() / nearest)
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.6


@every_order
def test_the_error_is_within_the_bound_of_the_nearest_plane(order, generator):
    """Each step adds (w - q)^2 / U_jj^2, and w is at most half a scale from q: unless a code stopped at the last level."""

    class Wide(IntGrid):
        """Levels to spare at both ends."""

        def fit(self, weight):
            return super().fit(3 * weight)

    weight, grid, H = torch.randn(32, 24, generator=generator, dtype=EXACT), Wide(6, None), correlated(24, generator)
    result = GPTQ(order=order).solve(weight, grid, H)
    assert ((result.codes > 0) & (result.codes < 2**6 - 1)).all()
    perm = H.diagonal().argsort(descending=True, stable=True) if order != "none" else torch.arange(24)
    U = torch.linalg.cholesky(damped(H)[perm][:, perm].inverse(), upper=True)
    bound = result.params.scale.double()[:, 0].square() / 4 * U.diagonal().pow(-2).sum()
    error = objective(weight, result, grid, damped(H))
    assert (error <= bound * (1 + 1e-9)).all()


@every_order
@settings(max_examples=25, deadline=None, derandomize=True)
@given(in_features=st.integers(1, 6), bits=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_no_other_code_is_better_for_the_column_rounded_last(order, in_features, bits, seed):
    """Brute force over the last column's codes; for a single column this is the optimum over everything."""
    generator = torch.Generator().manual_seed(seed)
    weight, H = torch.randn(3, in_features, generator=generator, dtype=EXACT), correlated(in_features, generator)
    grid = IntGrid(bits, None)
    result = GPTQ(order=order).solve(weight, grid, H)
    last = in_features - 1 if order == "none" else int(H.diagonal().argmin())
    best = objective(weight, result, grid, damped(H))
    for code in range(2**bits):
        codes = result.codes.clone()
        codes[:, last] = code
        assert (objective(weight, Result(codes, result.params), grid, damped(H)) >= best * (1 - 1e-9)).all()


@every_order
def test_weights_of_inputs_that_are_always_zero_are_rounded_to_nearest(order, generator):
    weight, H, grid = torch.randn(4, 16, generator=generator), correlated(16, generator), IntGrid(4, None)
    dead = torch.tensor([0, 5, 15])
    H[dead], H[:, dead] = 0, 0
    codes, params = GPTQ(order=order).solve(weight, grid, H)
    assert torch.equal(codes[:, dead], grid.encode(weight, params)[:, dead])
    assert not torch.equal(codes, grid.encode(weight, params))


@every_order
def test_inputs_that_are_all_zero_leave_rounding_to_nearest(order, generator):
    weight, grid = torch.randn(4, 16, generator=generator), IntGrid(4, 8)
    codes = GPTQ(order=order).solve(weight, grid, torch.zeros(16, 16)).codes
    assert torch.equal(codes, RTN().solve(weight, grid, None).codes)


@every_order
def test_fewer_tokens_than_inputs_still_do_better_than_rounding(order, generator):
    weight, x, grid = torch.randn(8, 64, generator=generator), torch.randn(3, 64, generator=generator), IntGrid(3, 16)
    H = (x.T @ x).double() / 3
    assert relative_error(weight, grid.decode(*GPTQ(order=order).solve(weight, grid, H)), H) < relative_error(
        weight, grid.decode(*RTN().solve(weight, grid, None)), H
    )


def test_damping_grows_until_the_moments_are_positive_definite(generator):
    weight, H = torch.randn(4, 8, generator=generator), torch.eye(8)
    H[0, 0] = -0.5  # what rounding may leave of a tiny eigenvalue, many times larger
    assert GPTQ(damp=0.01).solve(weight, IntGrid(4, 8), H).codes.shape == (4, 8)
    for hopeless in (-torch.eye(8), torch.full((8, 8), float("nan"))):
        with pytest.raises(ValueError, match="not positive definite; use more calibration data or a larger damp"):
            GPTQ().solve(weight, IntGrid(4, 8), hopeless)


def test_relative_error_is_the_error_of_the_outputs(generator):
    weight, decoded, x = (torch.randn(rows, 8, generator=generator) for rows in (4, 4, 100))
    expected = (x @ (weight - decoded).T).square().sum() / (x @ weight.T).square().sum()
    assert relative_error(weight, decoded, x.T @ x / 100) == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(weight, decoded, torch.eye(8)) == pytest.approx(relative_error(weight, decoded, None))
    assert relative_error(torch.zeros(4, 8), torch.zeros(4, 8), None) == 0


def test_gptq_says_that_it_needs_data():
    with pytest.raises(ValueError, match="needs calibration data"):
        GPTQ().solve(torch.randn(4, 8), IntGrid(4, 8), None)


@pytest.mark.parametrize("setting", [{"damp": 0.0}, {"order": "random"}, {"block_size": 0}], ids=str)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTQ(**setting)
