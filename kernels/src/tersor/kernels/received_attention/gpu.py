"""Received attention on the GPU: the denominators row by row, then the sums column by column; no sum is shared."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_BLOCK = 64


def received_attention(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor | Declined:
    if query.dtype == torch.float64:
        return Declined("float64")
    batch, num_heads, queries, head_dim = query.shape
    keys = key.shape[2]
    received = query.new_zeros(batch, num_heads, keys, dtype=torch.float32)
    if not (received.numel() and queries):
        return received
    query, key = query.contiguous(), key.contiguous()
    weight, bias = (query if t is None else t.expand(batch, num_heads, -1).contiguous() for t in (weight, bias))
    sizes = (
        head_dim**-0.5 if scale is None else scale,
        queries,
        keys,
        head_dim,
        num_heads // key.shape[1],
    )
    constants = (
        max(16, triton.next_power_of_2(head_dim)),
        _BLOCK,
        is_causal,
        bias is not query,
        triton.knobs.runtime.interpret,
        _PRECISION,
    )
    with torch.cuda.device_of(query):
        if lse is None:
            lse = query.new_empty(batch, num_heads, queries, dtype=torch.float32)
            _denominators[(batch * num_heads, triton.cdiv(queries, _BLOCK))](query, key, bias, lse, *sizes, *constants)
        _sums[(batch * num_heads, triton.cdiv(keys, _BLOCK))](
            query, key, bias, lse.contiguous(), weight, received, *sizes, weight is not query, *constants
        )
    return received


@triton.jit
def _denominators(
    query,
    key,
    bias,
    lse,
    scale,
    queries,
    keys,
    head_dim,
    group,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = _rows(query + head * queries * head_dim, i, queries, head_dim, CHANNELS)
    # not -inf, from which exp(x - running maximum) would be NaN
    largest = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    stop = keys
    if IS_CAUSAL:
        stop = tl.minimum(keys, (tl.program_id(1) + 1) * BLOCK + keys - queries)
    for start in range(0, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = _rows(key + head // group * keys * head_dim, j, keys, head_dim, CHANNELS)
        logits = _logits(
            q, k, bias + head * keys, i, j, scale, queries, keys, IS_CAUSAL, HAS_BIAS, INTERPRET, PRECISION
        )
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), 1)
        largest = new_largest
    empty = total == 0
    denominator = tl.where(empty, -float("inf"), largest + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + head * queries + i, denominator, mask=i < queries)


@triton.jit
def _sums(
    query,
    key,
    bias,
    lse,
    weight,
    received,
    scale,
    queries,
    keys,
    head_dim,
    group,
    HAS_WEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = _rows(key + head // group * keys * head_dim, j, keys, head_dim, CHANNELS)
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    if IS_CAUSAL:  # the first query that sees one of these keys
        start = tl.maximum(0, tl.program_id(1) * BLOCK - (keys - queries))
    for first in range(start, queries, BLOCK):
        i = first + tl.arange(0, BLOCK)
        q = _rows(query + head * queries * head_dim, i, queries, head_dim, CHANNELS)
        logits = _logits(
            q, k, bias + head * keys, i, j, scale, queries, keys, IS_CAUSAL, HAS_BIAS, INTERPRET, PRECISION
        )
        denominator = tl.load(lse + head * queries + i, mask=i < queries, other=-float("inf")).to(tl.float32)
        empty = denominator == -float("inf")
        shares = tl.exp(logits - tl.where(empty, 0.0, denominator)[:, None])
        if HAS_WEIGHT:
            shares *= tl.load(weight + head * queries + i, mask=i < queries, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(tl.where(empty[:, None], 0.0, shares), 0)
    tl.store(received + head * keys + j, total, mask=j < keys)


@triton.jit
def _rows(x, i, num, head_dim, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)[None, :]
    return tl.load(x + i[:, None] * head_dim + channel, mask=(i < num)[:, None] & (channel < head_dim), other=0.0)


@triton.jit
def _logits(
    q,
    k,
    bias,
    i,
    j,
    scale,
    queries,
    keys,
    IS_CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        logits += tl.load(bias + j, mask=j < keys, other=0.0).to(tl.float32)[None, :]
    visible = (j < keys)[None, :]
    if IS_CAUSAL:
        visible = visible & (j[None, :] <= (i + keys - queries)[:, None])
    return tl.where(visible, logits, -float("inf"))
