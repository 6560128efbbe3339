"""Our attention ops beside what a user would write: pytest kernels/benchmarks/bench_attention.py --benchmark-only

One thread and its CPU time, so that other work on the machine shows as little as possible. Caches are taken in turn from
64 MB of copies: every call finds them in memory, as in a model. Compare within a group only.
"""

import itertools
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.kernels import backend, pack_bits
from tersor.kernels.attend_quantized import attend_quantized
from tersor.kernels.merge_attention import merge_attention
from tersor.kernels.received_attention import received_attention
from tersor.kernels.tree_attention import ancestor_mask, tree_attention

pytestmark = pytest.mark.benchmark(
    timer=time.thread_time, min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=1, disable_gc=True
)

# 8 key and value heads, 4 query heads each, 128 channels
HEADS, GROUP, HEAD_DIM = 8, 4, 128


def copies(*tensors: Tensor):
    """The tensors, in copies that together exceed every cache, round and round."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(1 + 2**26 // nbytes)])


def full_cache(seq: int, dtype: torch.dtype):
    return copies(*(torch.randn(1, HEADS, seq, HEAD_DIM, dtype=dtype) for _ in range(2)))


def sdpa(query: Tensor, key: Tensor, value: Tensor, folded: bool, mask: Tensor | None = None) -> Tensor:
    """As models call it, or with the query heads of a key head folded into its queries: the cache is read once."""
    if folded:
        return scaled_dot_product_attention(query.view(1, HEADS, -1, HEAD_DIM), key, value)
    return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


@pytest.mark.parametrize(
    "contender", ["ours", "bfloat16", "bfloat16 folded", "float32", "float32 folded", "dequantise"]
)
@pytest.mark.parametrize("seq", [1024, 4096, 16384])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_attend_quantized(benchmark, bits, seq, contender):
    """KIVI's grids: keys per channel over 32 tokens, values per token over 32 channels."""
    benchmark.group = f"attend_quantized, {bits} bits, {seq} tokens"
    query = torch.randn(1, HEADS * GROUP, 1, HEAD_DIM)
    if contender not in ("ours", "dequantise"):
        dtype = getattr(torch, contender.split()[0])
        cache = full_cache(seq, dtype)
        benchmark(lambda: sdpa(query.to(dtype), *next(cache), folded="folded" in contender))
        return
    codes = torch.randint(0, 2**bits, (1, HEADS, seq, HEAD_DIM), dtype=torch.uint8)
    key_grid, value_grid = (torch.rand(1, HEADS, *shape).half() for shape in ((seq // 32, HEAD_DIM), (seq, 4)))
    packed = pack_bits(codes, bits)
    cache = copies(packed, key_grid, key_grid, packed, value_grid, value_grid)

    def attend():
        stored = next(cache)
        return attend_quantized(query, stored[:3], stored[3:], bits, bits, 32)

    with backend("cpu" if contender == "ours" else "reference"):
        benchmark(attend)


@pytest.mark.parametrize("contender", ["ours", "PyTorch"])
@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("rows", [32, 32 * 64])
def test_merge_attention(benchmark, rows, parts, contender):
    benchmark.group = f"merge_attention, {parts} parts of {rows} rows"
    outputs, lse = torch.randn(parts, rows, HEAD_DIM), torch.randn(parts, rows)
    with backend("cpu" if contender == "ours" else "reference"):
        benchmark(lambda: merge_attention(outputs, lse))


@pytest.mark.parametrize("contender", ["ours", "matrix"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "n"), [(12, 197), (2, 4096)])
def test_received_attention(benchmark, heads, n, is_causal, contender):
    benchmark.group = f"received_attention, {heads} heads, {n} tokens{', causal' * is_causal}"
    query, key = (torch.randn(1, heads, n, 64) for _ in range(2))

    def matrix():
        logits = query @ key.mT / 8
        if is_causal:
            logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        return logits.softmax(-1).sum(-2)

    benchmark(matrix if contender == "matrix" else lambda: received_attention(query, key, is_causal=is_causal))


@pytest.mark.parametrize("contender", ["ours", "full mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("nodes", "cached"), [(16, 1024), (16, 4096), (64, 4096)])
def test_tree_attention(benchmark, nodes, cached, dtype, contender):
    benchmark.group = f"tree_attention, {nodes} nodes, {cached} cached, {dtype}"
    ancestors = ancestor_mask(torch.tensor([-1, *(i // 2 for i in range(nodes - 1))]))
    mask = torch.cat([torch.ones(nodes, cached, dtype=torch.bool), ancestors], -1)
    query, cache = torch.randn(1, HEADS * GROUP, nodes, HEAD_DIM, dtype=dtype), full_cache(cached + nodes, dtype)
    if contender == "ours":
        benchmark(lambda: tree_attention(query, *next(cache), ancestors))
    else:
        benchmark(lambda: sdpa(query, *next(cache), folded=False, mask=mask))
