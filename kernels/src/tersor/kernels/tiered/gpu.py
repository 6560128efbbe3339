"""T24 on the GPU: a program decodes 1024 symbols, once it knows where their escapes start."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.coding.gpu import code_of, rank_of
from tersor.kernels.tiered import offsets_of, open_table

_GROUPS = 16


def tiered_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    base, base2, nibbles, raw = open_table("tiered_decode", table, stream, side, n)
    offsets = offsets_of("tiered_decode", stream, nibbles, raw, n, 64 * _GROUPS)
    symbols = table.new_empty(n)
    if n:
        with torch.cuda.device_of(stream):
            _decode[(triton.cdiv(n, 64 * _GROUPS),)](
                stream.contiguous(), nibbles.contiguous(), raw.contiguous(), offsets, symbols, n, base, base2, _GROUPS
            )
    return symbols


@triton.jit
def _decode(stream, nibbles, raw, offsets, symbols, n, base, base2, GROUPS: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 64)[None, :]
    # the last group is stored whole, and its padding is no escape
    at = group * 64 + lane
    code = code_of(stream, group, lane, at < n, 2)
    escaped = (code == 3).to(tl.int32)
    nibble_start = tl.load(offsets + 2 * tile)
    raw_start = tl.load(offsets + 2 * tile + 1)
    nibble = tier2(nibbles + nibble_start, escaped)
    deep = ((nibble == 15) & (escaped > 0)).to(tl.int32)
    third = tl.load(raw + raw_start + rank_of(deep), mask=deep > 0, other=0).to(tl.int32)
    second = tl.where(deep > 0, third, base2 + nibble)
    tl.store(symbols + at, tl.where(escaped > 0, second, base + code).to(tl.uint8), mask=at < n)


@triton.jit
def tier2(nibbles, escaped):
    """(GROUPS, 64): the nibbles of the escaped symbols; each group's start at a byte."""
    rank = tl.cumsum(escaped, 1) - escaped
    size = (tl.sum(escaped, 1) + 1) // 2
    byte = (tl.cumsum(size, 0) - size)[:, None] + rank // 2
    return (tl.load(nibbles + byte, mask=escaped > 0, other=0).to(tl.int32) >> (rank % 2 * 4)) & 15
