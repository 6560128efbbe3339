"""Selection of tokens, sums of features and butterflies beside the same in plain PyTorch, in one run:
pytest kernels/benchmarks/bench_selection.py --benchmark-only

One thread and its CPU time, so that other work on the machine shows as little as possible. Compare within a group only.
"""

import time

import pytest
import torch
from torch.nn.functional import normalize

from tersor.kernels import backend, hadamard
from tersor.kernels.bipartite_match import bipartite_match
from tersor.kernels.butterfly import butterfly
from tersor.kernels.gather_tokens import gather_tokens
from tersor.kernels.merge_tokens import merge_tokens
from tersor.kernels.topk_mask import topk_mask
from tersor.kernels.weighted_sum import weighted_sum

pytestmark = pytest.mark.benchmark(
    timer=time.thread_time, min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=1, disable_gc=True
)


def run(benchmark, contender, op, *args, **others):
    """Our body, the reference, or one of the others by name."""
    if contender in others:
        benchmark(others[contender])
        return
    with backend("cpu" if contender == "ours" else "reference"):
        benchmark(lambda: op(*args))


@pytest.mark.parametrize("contender", ["ours", "reference", "gather", "copy"])
@pytest.mark.parametrize(("batch", "tokens", "dim", "k"), [(8, 197, 768, 98), (2, 4096, 1024, 2048)])
def test_gather_tokens(benchmark, batch, tokens, dim, k, contender):
    benchmark.group = f"gather_tokens {k} of {batch} x {tokens} x {dim}"
    x = torch.randn(batch, tokens, dim)
    index = torch.rand(batch, tokens).argsort(-1)[:, :k].sort(-1).values
    wide = index[..., None].expand(-1, -1, dim)
    others = {"gather": lambda: x.gather(1, wide), "copy": lambda: x[:, :k].contiguous()}
    run(benchmark, contender, gather_tokens, x, index, **others)


@pytest.mark.parametrize("contender", ["ours", "reference", "scatter"])
@pytest.mark.parametrize(("batch", "tokens", "dim", "r"), [(8, 197, 768, 49), (1, 4096, 1024, 1024)])
def test_merge_tokens(benchmark, batch, tokens, dim, r, contender):
    """The last r tokens go into random others."""
    benchmark.group = f"merge_tokens {r} of {batch} x {tokens} x {dim}"
    x, size, kept = torch.randn(batch, tokens, dim), torch.rand(batch, tokens) + 0.5, tokens - r
    into = torch.randint(kept, (batch, r))
    place = torch.cat([torch.arange(kept).expand(batch, -1), into], 1)

    def scatter():
        total = size[:, :kept].scatter_add(1, into, size[:, kept:])
        wide = into[..., None].expand(-1, -1, dim)
        step = (x[:, kept:] - x.gather(1, wide)) * (size[:, kept:] / total.gather(1, into))[..., None]
        return x[:, :kept].scatter_add(1, wide, step), total

    run(benchmark, contender, merge_tokens, x, size, place, kept, scatter=scatter)


@pytest.mark.parametrize("contender", ["ours", "reference", "matmul alone"])
@pytest.mark.parametrize("shape", [(8, 98, 98, 64), (1, 2048, 2048, 64), (1, 4096, 4096, 384)], ids=str)
def test_bipartite_match(benchmark, shape, contender):
    batch, n, m, dim = shape
    benchmark.group = f"bipartite_match {batch} x {n} x {m}, {dim} features"
    a, b = torch.randn(batch, n, dim), torch.randn(batch, m, dim)
    others = {"matmul alone": lambda: normalize(a, dim=-1) @ normalize(b, dim=-1).mT}
    run(benchmark, contender, bipartite_match, a, b, **others)


@pytest.mark.parametrize("contender", ["ours", "reference", "topk", "kthvalue"])
@pytest.mark.parametrize(("rows", "n", "k"), [(64, 1024, 512), (32, 16384, 2048), (1, 2**20, 2**10)])
def test_topk_mask(benchmark, rows, n, k, contender):
    benchmark.group = f"topk_mask {k} of {rows} x {n}"
    scores = torch.randn(rows, n)

    def topk():  # any of equal ones
        chosen = scores.topk(k, dim=-1, sorted=False).indices
        return torch.zeros(rows, n, dtype=torch.bool).scatter_(-1, chosen, True)

    others = {"topk": topk, "kthvalue": lambda: scores >= scores.kthvalue(n - k + 1, -1, True).values}
    run(benchmark, contender, topk_mask, scores, k, **others)


@pytest.mark.parametrize("contender", ["ours", "reference", "add_", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "n"), [(3, 2**17), (3, 2**22)])
def test_weighted_sum(benchmark, k, n, dtype, contender):
    benchmark.group = f"weighted_sum of {k} x {n}, {dtype}"
    weights, history = [2.0, -1.5, 0.5], list(torch.randn(k, n).to(dtype))

    def add_():
        total = torch.zeros(n)
        for weight, feature in zip(weights, history):
            total.add_(feature, alpha=weight)
        return total.to(dtype)

    run(benchmark, contender, weighted_sum, weights, history, add_=add_, copy=history[0].clone)


@pytest.mark.parametrize("contender", ["ours", "reference", "hadamard", "matmul"])
@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (256, 4096), (4096, 128)])
def test_butterfly(benchmark, rows, n, contender):
    benchmark.group = f"butterfly {rows} x {n}"
    x, angles = torch.randn(rows, n), torch.randn(n.bit_length() - 1, n // 2)
    B = butterfly(torch.eye(n), angles) if contender == "matmul" else x
    others = {"hadamard": lambda: hadamard(x), "matmul": lambda: x @ B}
    run(benchmark, contender, butterfly, x, angles, **others)
