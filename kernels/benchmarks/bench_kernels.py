"""Our ops beside what a user would write instead, in one run: pytest kernels/benchmarks/bench_kernels.py --benchmark-only

One thread and its CPU time, so that other work on the machine shows as little as possible. Weights are taken in turn from
64 MB of copies: every call finds them in memory and not in a cache, as in a model. Compare within a group only.
"""

import itertools
import time

import pytest
import torch
from torch.nn.functional import linear

from tersor.kernels import backend, dequant_matmul, hadamard, pack_bits, unpack_bits
from tersor.kernels.hadamard.matrix import hadamard_matrix

pytestmark = pytest.mark.benchmark(
    timer=time.thread_time, min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=1, disable_gc=True
)


def copies(*tensors):
    """The tensors, in copies that together exceed every cache, round and round."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(1 + 2**26 // nbytes)])


@pytest.mark.parametrize("contender", ["packed", "float32", "bfloat16", "dequantise"])
@pytest.mark.parametrize("rows", [1, 4, 16, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequant_matmul(benchmark, bits, rows, contender):
    n, group_size = 2048, 128
    benchmark.group = f"dequant_matmul {n} x {n}, {bits} bits, {rows} rows"
    if contender in ("float32", "bfloat16"):
        dtype = getattr(torch, contender)
        x, weights = torch.randn(rows, n, dtype=dtype), copies(torch.randn(n, n, dtype=dtype))
        benchmark(lambda: linear(x, *next(weights)))
        return
    grid = torch.rand(n, n // group_size) + 0.1
    codes = torch.randint(0, 2**bits, (n, n), dtype=torch.uint8)
    x, weights = torch.randn(rows, n), copies(pack_bits(codes, bits), grid, grid)
    with backend("cpu" if contender == "packed" else "reference"):
        benchmark(lambda: dequant_matmul(x, *next(weights), bits, group_size))


@pytest.mark.parametrize("contender", ["ours", "butterfly", "matmul"])
@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (256, 4096), (256, 14336), (4096, 128)])
def test_hadamard(benchmark, rows, n, contender):
    benchmark.group = f"hadamard {rows} x {n}"
    x = torch.randn(rows, n)
    if contender == "matmul":
        H = hadamard_matrix(n, torch.float32, x.device)
        benchmark(lambda: x @ H)
    else:
        with backend("cpu" if contender == "ours" else "reference"):
            benchmark(lambda: hadamard(x))


@pytest.mark.parametrize("contender", ["pack", "unpack", "pack in PyTorch", "unpack in PyTorch", "copy"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [128, 4096])
def test_bits(benchmark, n, bits, contender):
    codes = torch.randint(0, 2**bits, (2**22 // n, n), dtype=torch.uint8)
    benchmark.group = f"{tuple(codes.shape)} codes, {bits} bits"
    packed = pack_bits(codes, bits)
    with backend("reference" if "PyTorch" in contender else "cpu"):
        if contender == "copy":
            benchmark(codes.clone)
        elif contender.startswith("pack"):
            benchmark(lambda: pack_bits(codes, bits))
        else:
            benchmark(lambda: unpack_bits(packed, bits, n))
