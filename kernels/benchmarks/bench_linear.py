"""Compressed linear layers beside torch's own, in one run: pytest kernels/benchmarks/bench_linear.py --benchmark-only

One thread and its CPU time, so that other work on the machine shows as little as possible. Weights are taken in turn
from more than 150 MB of copies: every call finds them in memory and not in a cache, as in a model. Compare within a
group only.
"""

import itertools
import time

import pytest
import torch
from torch.nn.functional import linear

from tersor.kernels import (
    dequant_matmul,
    int8_linear,
    lookup_linear,
    pack_bits,
    vector_codebook_linear,
    w8a8_linear,
)

pytestmark = pytest.mark.benchmark(
    timer=time.thread_time, min_rounds=20, max_time=0.5, warmup=True, warmup_iterations=2, disable_gc=True
)

N, GROUP_SIZE = 2048, 128
ROWS = [1, 4, 16]


def copies(*tensors):
    """The tensors, in copies that together exceed every cache, round and round."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(2 + 150 * 2**20 // nbytes)])


def grid():
    return torch.rand(N, N // GROUP_SIZE) + 0.1


def some_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("contender", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
def test_dense(benchmark, rows, contender):
    benchmark.group = f"{rows} rows"
    dtype = getattr(torch, contender)
    x, weights = torch.randn(rows, N, dtype=dtype), copies(torch.randn(N, N, dtype=dtype))
    benchmark(lambda: linear(x, *next(weights)))


@pytest.mark.parametrize("contender", ["integers", "nf4", "zero_point", "dequant_matmul"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_lookup_linear(benchmark, rows, bits, contender):
    benchmark.group = f"{rows} rows"
    packed = pack_bits(torch.randint(0, 2**bits, (N, N), dtype=torch.uint8), bits)
    codebook = torch.randn(2**bits) if contender == "nf4" else torch.arange(2.0**bits)
    x, weights = torch.randn(rows, N), copies(packed, grid(), grid())

    def run():
        packed, scale, zero_point = next(weights)
        if contender == "dequant_matmul":
            return dequant_matmul(x, packed, scale, zero_point, bits, GROUP_SIZE)
        zero_point = zero_point if contender == "zero_point" else None
        return lookup_linear(x, packed, codebook, scale, bits, GROUP_SIZE, zero_point)

    benchmark(run)


@pytest.mark.parametrize("rows", ROWS)
def test_aten_int4(benchmark, rows):
    benchmark.group = f"{rows} rows"
    codes = torch.randint(0, 16, (N, N), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    weights = copies(packed, torch.rand(N // GROUP_SIZE, N, 2, dtype=torch.bfloat16))
    x = torch.randn(rows, N, dtype=torch.bfloat16)

    def run():
        packed, scales_and_zeros = next(weights)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_and_zeros)

    benchmark(run)


@pytest.mark.parametrize("contender", ["channels", "groups", "w8a8", "aten_int8pack", "aten_int_mm"])
@pytest.mark.parametrize("rows", ROWS)
def test_int8(benchmark, rows, contender):
    benchmark.group = f"{rows} rows"
    x, codes, weights, scale = torch.randn(rows, N), some_int8(rows, N), copies(some_int8(N, N)), torch.rand(N)
    half, x_scale, groups = x.bfloat16(), torch.rand(rows), grid()
    run = {
        "channels": lambda: int8_linear(x, *next(weights), scale[:, None]),
        "groups": lambda: int8_linear(x, *next(weights), groups, groups),
        "w8a8": lambda: w8a8_linear(codes, x_scale, *next(weights), scale),
        "aten_int8pack": lambda: torch.ops.aten._weight_int8pack_mm(half, *next(weights), scale.bfloat16()),
        "aten_int_mm": lambda: torch._int_mm(codes, next(weights)[0].T),
    }[contender]
    benchmark(run)


@pytest.mark.parametrize(("num_codebooks", "bits"), [(1, 8), (2, 8), (1, 12)])
@pytest.mark.parametrize("rows", ROWS)
def test_vector_codebook_linear(benchmark, rows, num_codebooks, bits):
    benchmark.group = f"{rows} rows"
    codes = torch.randint(0, 2**bits, (N, N // 8, num_codebooks)).to(torch.uint8 if bits == 8 else torch.uint16)
    x, codebooks, scale = torch.randn(rows, N), torch.randn(num_codebooks, 2**bits, 8), torch.rand(N)
    weights = copies(codes)
    benchmark(lambda: vector_codebook_linear(x, *next(weights), codebooks, scale))
