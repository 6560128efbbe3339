"""Attention over packed codes on the GPU: flash-decoding, split over the tokens, then merged.

A program takes the queries of one key and value head and a part of the tokens, and decodes tile by tile in registers.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.merge_attention import merge_attention

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
# enough to fill a large GPU; a part shorter than this many tokens costs more to merge than it brings
_PROGRAMS, _MIN_PART = 256, 256


def attend_quantized(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    key_bits: int,
    value_bits: int,
    key_token_group: int = 1,
    value_token_group: int = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | Declined:
    if query.dtype == torch.float64:
        return Declined("float64")
    batch, num_heads, num_queries, head_dim = query.shape
    num_key_value_heads, seq_len = key[0].shape[1:3]
    heads, rows = batch * num_key_value_heads, num_heads // num_key_value_heads * num_queries
    if not (query.numel() and seq_len):
        return query.new_zeros(query.shape), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    block_tokens = 64 if head_dim <= 128 else 32
    row_blocks = triton.cdiv(rows, block_rows)
    parts = max(1, min(triton.cdiv(_PROGRAMS, heads * row_blocks), seq_len // _MIN_PART))
    part_len = triton.cdiv(seq_len, parts * block_tokens) * block_tokens
    output = query.new_empty(parts, heads, rows, head_dim, dtype=torch.float32)
    lse = query.new_empty(parts, heads, rows, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _attend[(heads, parts, row_blocks)](
            query.reshape(heads, rows, head_dim).contiguous(),
            *(t.contiguous() for t in key),
            *(t.contiguous() for t in value),
            query if bias is None else bias.contiguous(),
            output,
            lse,
            head_dim**-0.5 if scale is None else scale,
            rows,
            seq_len,
            part_len,
            head_dim,
            (head_dim + 7) // 8,
            num_key_value_heads,
            key[1].shape[3:].numel(),
            value[1].shape[3:].numel(),
            key_token_group,
            value_token_group,
            0 if bias is None or bias.shape[0] == 1 else bias.shape[1],
            0 if bias is None or bias.shape[1] == 1 else 1,
            key_bits,
            value_bits,
            block_rows,
            block_tokens,
            max(16, triton.next_power_of_2(head_dim)),
            bias is not None,
            triton.knobs.runtime.interpret,
            _PRECISION,
        )
    merged, total = (output[0], lse[0]) if parts == 1 else merge_attention(output, lse)
    return merged.to(query.dtype).view(query.shape), total.view(query.shape[:3])


@triton.jit
def _attend(
    query,
    key_packed,
    key_scale,
    key_minimum,
    value_packed,
    value_scale,
    value_minimum,
    bias,
    output,
    lse,
    scale,
    num_rows,
    seq_len,
    part_len,
    head_dim,
    c,
    num_key_value_heads,
    key_groups,
    value_groups,
    key_token_group,
    value_token_group,
    bias_batch,
    bias_head,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)[None, :]
    row_inside = (row < num_rows)[:, None] & (channel < head_dim)
    q = tl.load(query + (head * num_rows + row)[:, None] * head_dim + channel, mask=row_inside, other=0.0)
    dtype: tl.constexpr = (
        tl.float32 if INTERPRET else q.dtype
    )  # the interpreter multiplies the bit patterns of bfloat16
    bias += (head // num_key_value_heads * bias_batch + head % num_key_value_heads * bias_head) * seq_len
    # not -inf, from which exp(x - running maximum) would be NaN
    largest = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(part * part_len, tl.minimum((part + 1) * part_len, seq_len), TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = (t < seq_len)[:, None] & (channel < head_dim)
        k = _decode(
            key_packed, key_scale, key_minimum, head, t, channel, inside, seq_len, head_dim, c, key_groups,
            key_token_group, KEY_BITS,
        )  # fmt: skip
        logits = tl.dot(q.to(dtype), tl.trans(k.to(q.dtype).to(dtype)), input_precision=PRECISION) * scale
        if HAS_BIAS:
            logits += tl.load(bias + t, mask=t < seq_len, other=0.0).to(tl.float32)[None, :]
        logits = tl.where((t < seq_len)[None, :], logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - new_largest[:, None])
        keep = tl.exp(largest - new_largest)
        total = total * keep + tl.sum(weights, 1)
        v = _decode(
            value_packed, value_scale, value_minimum, head, t, channel, inside, seq_len, head_dim, c, value_groups,
            value_token_group, VALUE_BITS,
        )  # fmt: skip
        weighted = tl.dot(weights.to(q.dtype).to(dtype), v.to(q.dtype).to(dtype), input_precision=PRECISION)
        merged = merged * keep[:, None] + weighted
        largest = new_largest
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    at = (part * tl.num_programs(0) + head) * num_rows + row
    tl.store(output + at[:, None] * head_dim + channel, merged / total[:, None], mask=row_inside)
    tl.store(lse + at, tl.where(empty, -float("inf"), largest + tl.log(total)), mask=row < num_rows)


@triton.jit
def _decode(
    packed, scale, minimum, head, t, channel, inside, seq_len, head_dim, c, groups, token_group, BITS: tl.constexpr
):  # fmt: skip
    """minimum + codes * scale of the tokens t (TOKENS, CHANNELS), 0 outside."""
    t = t[:, None]
    code = tl.zeros(inside.shape, tl.int32)
    for p in tl.static_range(4):
        if BITS & (8 >> p):
            code |= _plane(packed + (head * seq_len + t) * (c * BITS), channel, c, inside, BITS, 8 >> p)
    token_groups = (seq_len + token_group - 1) // token_group
    at = (head * token_groups + t // token_group) * groups + channel // (head_dim // groups)
    s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(minimum + at, mask=inside, other=0.0).to(tl.float32)
    return m + code.to(tl.float32) * s


@triton.jit
def _plane(packed, k, c, inside, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of this width holds of the codes k of each row."""
    SHIFT: tl.constexpr = BITS & -(2 * WIDTH)
    byte = tl.load(packed + SHIFT * c + k % (WIDTH * c), mask=inside, other=0).to(tl.int32)
    return ((byte >> (k // (WIDTH * c) * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT
