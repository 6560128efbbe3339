"""Tree attention on the GPU: flash-decoding, split over the tokens, then merged; only the tree's tiles read the mask."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
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


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | Declined:
    if query.dtype == torch.float64:
        return Declined("float64")
    batch, num_heads, nodes, head_dim = query.shape
    num_key_value_heads, keys = key.shape[1:3]
    heads, rows = batch * num_key_value_heads, num_heads // num_key_value_heads * nodes
    if query.numel() == 0:
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    block_tokens = 64 if head_dim <= 128 else 32
    row_blocks = triton.cdiv(rows, block_rows)
    parts = max(1, min(triton.cdiv(_PROGRAMS, heads * row_blocks), keys // _MIN_PART))
    part_len = triton.cdiv(keys, parts * block_tokens) * block_tokens
    output = query.new_empty(parts, heads, rows, head_dim, dtype=torch.float32)
    lse = query.new_empty(parts, heads, rows, dtype=torch.float32)
    # caches hand out views of longer buffers: tokens lie head_dim apart, heads and rows of the batch anywhere
    key, value = (t if t.stride()[2:] == (head_dim, 1) else t.contiguous() for t in (key, value))
    with torch.cuda.device_of(query):
        _attend[(heads, parts, row_blocks)](
            query.reshape(heads, rows, head_dim).contiguous(),
            key,
            value,
            ancestors.contiguous(),
            query if bias is None else bias.contiguous(),
            output,
            lse,
            head_dim**-0.5 if scale is None else scale,
            rows,
            keys,
            nodes,
            part_len,
            head_dim,
            num_key_value_heads,
            *key.stride()[:2],
            *value.stride()[:2],
            0 if ancestors.dim() == 2 else nodes * nodes,
            0 if bias is None or bias.shape[0] == 1 else bias.shape[1],
            0 if bias is None or bias.shape[1] == 1 else 1,
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
    key,
    value,
    ancestors,
    bias,
    output,
    lse,
    scale,
    num_rows,
    keys,
    nodes,
    part_len,
    head_dim,
    num_key_value_heads,
    key_batch,
    key_head,
    value_batch,
    value_head,
    ancestors_batch,
    bias_batch,
    bias_head,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    batch, head_of_row = head // num_key_value_heads, head % num_key_value_heads
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)[None, :]
    row_inside = (row < num_rows)[:, None] & (channel < head_dim)
    q = tl.load(query + (head * num_rows + row)[:, None] * head_dim + channel, mask=row_inside, other=0.0)
    dtype: tl.constexpr = (
        tl.float32 if INTERPRET else q.dtype
    )  # the interpreter multiplies the bit patterns of bfloat16
    key += batch * key_batch + head_of_row * key_head
    value += batch * value_batch + head_of_row * value_head
    bias += (batch * bias_batch + head_of_row * bias_head) * keys
    ancestors += batch * ancestors_batch + (row % nodes)[:, None] * nodes
    # not -inf, from which exp(x - running maximum) would be NaN
    largest = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(part * part_len, tl.minimum((part + 1) * part_len, keys), TOKENS):
        t = start + tl.arange(0, TOKENS)
        at = t[:, None] * head_dim + channel
        inside = (t < keys)[:, None] & (channel < head_dim)
        k = tl.load(key + at, mask=inside, other=0.0)
        logits = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision=PRECISION) * scale
        if HAS_BIAS:
            logits += tl.load(bias + t, mask=t < keys, other=0.0).to(tl.float32)[None, :]
        node = (t - (keys - nodes))[None, :]
        in_tree = (node >= 0) & (node < nodes) & (row < num_rows)[:, None]
        seen = tl.load(ancestors + node, mask=in_tree, other=0).to(tl.int32)
        logits = tl.where((node < 0) | (seen != 0), logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - new_largest[:, None])
        keep = tl.exp(largest - new_largest)
        total = total * keep + tl.sum(weights, 1)
        v = tl.load(value + at, mask=inside, other=0.0)
        weighted = tl.dot(weights.to(q.dtype).to(dtype), v.to(dtype), input_precision=PRECISION)
        merged = merged * keep[:, None] + weighted
        largest = new_largest
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    at_row = (part * tl.num_programs(0) + head) * num_rows + row
    tl.store(output + at_row[:, None] * head_dim + channel, merged / total[:, None], mask=row_inside)
    tl.store(lse + at_row, tl.where(empty, -float("inf"), largest + tl.log(total)), mask=row < num_rows)
