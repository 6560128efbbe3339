"""Attention over compressed caches, and what pruning and speculation need: 8 key and value heads, 4 query heads each,
128 channels."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.kernels.attend_quantized import attend_quantized
from tersor.kernels.bench.case import Call, Case, Prepare, copies, on, ours, reference
from tersor.kernels.bits import pack_bits
from tersor.kernels.merge_attention import merge_attention
from tersor.kernels.received_attention import received_attention
from tersor.kernels.tree_attention import ancestor_mask, tree_attention

HEADS, GROUP, HEAD_DIM = 8, 4, 128
TOKEN_GROUP = 32  # tokens per grid of keys, channels per grid of values: KIVI's (arXiv:2402.02750)

# at 4 bits: over decoding all first, and over the whole cache in bfloat16, whichever way it is read
BARS = {"dequantise": 4.0, "SDPA bfloat16": 1.5, "SDPA bfloat16, folded": 1.5}


def cases(seqs: tuple[int, ...] = (1024, 4096, 16384)) -> list[Case]:
    return [
        *(_attend(bits, seq) for bits in (2, 3, 4, 8) for seq in seqs),
        *(_merge(parts, rows) for rows in (32, 32 * 64) for parts in (2, 8)),
        *(_received(heads, n, is_causal) for heads, n in ((12, 197), (2, seqs[1])) for is_causal in (False, True)),
        *(
            _tree(nodes, cached, dtype)
            for nodes, cached in ((16, seqs[0]), (16, seqs[1]), (64, seqs[1]))
            for dtype in ("bfloat16", "float32")
        ),
    ]


def _cache(seq: int, dtype: torch.dtype) -> Iterator[Any]:
    return copies(*(torch.randn(1, HEADS, seq, HEAD_DIM, dtype=dtype) for _ in range(2)))


def _attend(bits: int, seq: int) -> Case:
    """One query."""

    def prepare() -> Call:
        query = torch.randn(1, HEADS * GROUP, 1, HEAD_DIM)
        packed = pack_bits(torch.randint(0, 2**bits, (1, HEADS, seq, HEAD_DIM), dtype=torch.uint8), bits)
        keys = torch.rand(1, HEADS, seq // TOKEN_GROUP, HEAD_DIM).half()
        values = torch.rand(1, HEADS, seq, HEAD_DIM // TOKEN_GROUP).half()
        cache = copies(packed, keys, keys, packed, values, values)

        def run() -> object:
            stored = next(cache)
            return attend_quantized(query, stored[:3], stored[3:], bits, bits, TOKEN_GROUP)

        return run

    def sdpa(dtype: torch.dtype) -> Call:
        """As models call it."""
        query, cache = torch.randn(1, HEADS * GROUP, 1, HEAD_DIM, dtype=dtype), _cache(seq, dtype)
        return lambda: scaled_dot_product_attention(query, *next(cache), enable_gqa=True)

    def folded(dtype: torch.dtype) -> Call:
        """With the query heads of a key head as its queries: the cache is read once."""
        query, cache = torch.randn(1, HEADS, GROUP, HEAD_DIM, dtype=dtype), _cache(seq, dtype)
        return lambda: scaled_dot_product_attention(query, *next(cache))

    contenders: dict[str, Prepare] = {"ours": ours(prepare), "dequantise": reference(prepare)}
    for name in ("bfloat16", "float32"):
        contenders[f"SDPA {name}"] = partial(sdpa, getattr(torch, name))
        contenders[f"SDPA {name}, folded"] = partial(folded, getattr(torch, name))
    # codes of keys and values; scales and minima in float16
    nbytes = HEADS * seq * (2 * HEAD_DIM * bits // 8 + 2 * 4 * HEAD_DIM // TOKEN_GROUP)
    bars = BARS if bits == 4 and seq >= 4096 else {}
    return Case(f"attend_quantized {bits} bits", f"{seq} tokens", nbytes, contenders, bars)


def _merge(parts: int, rows: int) -> Case:
    prepare = on(lambda: (torch.randn(parts, rows, HEAD_DIM), torch.randn(parts, rows)), merge_attention)
    contenders = {"ours": ours(prepare), "PyTorch": reference(prepare)}
    return Case("merge_attention", f"{parts} parts of {rows} rows", 4 * parts * rows * (HEAD_DIM + 1), contenders)


def _received(heads: int, n: int, is_causal: bool) -> Case:
    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(1, heads, n, 64), torch.randn(1, heads, n, 64)

    def matrix(query: Tensor, key: Tensor) -> Tensor:
        logits = query @ key.mT / 8
        if is_causal:
            logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        return logits.softmax(-1).sum(-2)

    contenders = {
        "ours": ours(on(draw, partial(received_attention, is_causal=is_causal))),
        "whole matrix": on(draw, matrix),
    }
    shape = f"{heads} heads, {n} tokens{', causal' * is_causal}"
    return Case("received_attention", shape, 2 * 4 * heads * n * 64, contenders)


def _tree(nodes: int, cached: int, name: str) -> Case:
    dtype = getattr(torch, name)

    def inputs() -> tuple[Tensor, Tensor, Iterator[Any]]:
        query = torch.randn(1, HEADS * GROUP, nodes, HEAD_DIM, dtype=dtype)
        ancestors = ancestor_mask(torch.tensor([-1, *(i // 2 for i in range(nodes - 1))]))
        return query, ancestors, _cache(cached + nodes, dtype)

    def prepare() -> Call:
        query, ancestors, cache = inputs()

        def run() -> object:
            key, value = next(cache)
            return tree_attention(query, key, value, ancestors)

        return run

    def full_mask() -> Call:
        query, ancestors, cache = inputs()
        mask = torch.cat([torch.ones(nodes, cached, dtype=torch.bool), ancestors], -1)

        def run() -> Tensor:
            key, value = next(cache)
            return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

        return run

    contenders = {"ours": ours(prepare), "SDPA, full mask": full_mask}
    nbytes = 2 * HEADS * (cached + nodes) * HEAD_DIM * dtype.itemsize
    return Case(f"tree_attention {name}", f"{nodes} nodes, {cached} cached", nbytes, contenders)
