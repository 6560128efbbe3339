"""P3 and P4 on the GPU: a program decodes 1024 symbols, once it knows where their escapes start."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.coding import require
from tersor.kernels.coding.gpu import code_of, rank_of
from tersor.kernels.fixed_planes import ANOTHER_SIDE, escapes_of, open_table

_GROUPS = 16


def fixed_planes_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    bits, base = open_table(table, stream, n)
    count = escapes_of(stream, bits)
    until = count.cumsum(0)
    require("fixed_planes_decode", int(count.sum()) == side.numel(), ANOTHER_SIDE)
    symbols = table.new_empty(n)
    if n:
        offsets = (until - count)[::_GROUPS].contiguous()
        with torch.cuda.device_of(stream):
            _decode[(triton.cdiv(n, 64 * _GROUPS),)](
                stream.contiguous(), side.contiguous(), offsets, symbols, n, base, bits, _GROUPS
            )
    return symbols


@triton.jit
def _decode(stream, side, offsets, symbols, n, base, BITS: tl.constexpr, GROUPS: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 64)[None, :]
    at = group * 64 + lane
    code = code_of(stream, group, lane, at < n, BITS)
    escaped = (code == (1 << BITS) - 1).to(tl.int32)
    whole = tl.load(side + tl.load(offsets + tile) + rank_of(escaped), mask=escaped > 0, other=0).to(tl.int32)
    tl.store(symbols + at, tl.where(escaped > 0, whole, base + code).to(tl.uint8), mask=at < n)
