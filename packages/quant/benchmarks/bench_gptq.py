"""Time to solve one layer: rounding, GPTQ in blocks, and GPTQ as the paper derives it, column by column.

Run by hand: pytest packages/quant/benchmarks/bench_gptq.py --benchmark-only
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.quant.grid import IntGrid, IntParams
from tersor.quant.solver import GPTQ, RTN, Result, relative_error

GRID = IntGrid(4, 64)


def column_by_column(weight: Tensor, grid: IntGrid, hessian: Tensor, damp: float = 0.01) -> Result:
    """Every column corrects all later ones at once, and the inverse of H is reduced by each."""
    W, row, width = weight.clone(), replace(grid, group_size=None), grid.group_size or weight.shape[1]
    inverse = (hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)).inverse()
    scale, zero_point = grid.fit(weight)
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for j in range(W.shape[1]):
        group = slice(j // width, j // width + 1)
        if j % width == 0:
            scale[:, group], zero_point[:, group] = row.fit(W[:, j : j + width])
        params = IntParams(scale[:, group], zero_point[:, group])
        codes[:, j : j + 1] = row.encode(W[:, j : j + 1], params)
        error = (W[:, j] - row.decode(codes[:, j : j + 1], params)[:, 0]) / inverse[j, j]
        W[:, j:] -= error.outer(inverse[j, j:]).to(W.dtype)
        inverse[j:, j:] -= inverse[j:, j].outer(inverse[j, j:]) / inverse[j, j]
    return Result(codes, IntParams(scale, zero_point))


@pytest.fixture(params=[256, 1024], ids=lambda width: f"{width}x{width}")
def layer(request) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs."""
    generator, width = torch.Generator().manual_seed(0), request.param
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(width, width, generator=generator), (x.T @ x).double() / len(x)


def run(benchmark, layer, solve, rounds=3):
    weight, hessian = layer
    result = benchmark.pedantic(solve, (weight, GRID, hessian), rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["relative_error"] = relative_error(weight, GRID.decode(*result), hessian)


def test_rounding_to_nearest(benchmark, layer):
    run(benchmark, layer, RTN().solve)


@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_gptq(benchmark, layer, order):
    run(benchmark, layer, GPTQ(order=order).solve)


def test_gptq_column_by_column(benchmark, layer):
    run(benchmark, layer, column_by_column, rounds=1)
