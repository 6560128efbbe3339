"""Bit packing on the GPU: one thread per byte packed, or per code unpacked."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.bits import check_range

_BLOCK = 1024


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    check_range(codes, bits)
    n = codes.shape[-1]
    c = (n + 7) // 8
    packed = codes.new_empty(*codes.shape[:-1], c * bits)
    if packed.numel():
        with torch.cuda.device_of(codes):
            grid = (triton.cdiv(packed.numel(), _BLOCK),)
            _pack[grid](codes.contiguous(), packed, n, c, packed.numel(), bits, _BLOCK)
    return packed


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    codes = packed.new_empty(*packed.shape[:-1], n)
    if codes.numel():
        with torch.cuda.device_of(packed):
            grid = (triton.cdiv(codes.numel(), _BLOCK),)
            _unpack[grid](packed.contiguous(), codes, n, (n + 7) // 8, codes.numel(), bits, _BLOCK)
    return codes


@triton.jit
def _pack(codes, packed, n, c, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, j = at // (c * BITS), at % (c * BITS)
    byte = tl.zeros((BLOCK,), tl.int32)
    for p in tl.static_range(4):
        if BITS & (8 >> p):
            byte |= _pack_plane(codes + row * n, j, n, c, at < total, BITS, 8 >> p)
    tl.store(packed + at, byte.to(tl.uint8), mask=at < total)


@triton.jit
def _pack_plane(codes, j, n, c, inside, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes j of the packed row where they lie in the plane of this width, else 0."""
    SHIFT: tl.constexpr = BITS & -(2 * WIDTH)
    byte = tl.zeros(j.shape, tl.int32)
    j -= SHIFT * c
    for i in tl.static_range(8 // WIDTH):
        k = i * WIDTH * c + j
        code = tl.load(codes + k, mask=inside & (j >= 0) & (j < WIDTH * c) & (k < n), other=0).to(tl.int32)
        byte |= ((code >> SHIFT) & ((1 << WIDTH) - 1)) << (i * WIDTH)
    return byte


@triton.jit
def _unpack(packed, codes, n, c, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, k = at // n, at % n
    code = tl.zeros((BLOCK,), tl.int32)
    for p in tl.static_range(4):
        if BITS & (8 >> p):
            code |= _unpack_plane(packed + row * (c * BITS), k, c, at < total, BITS, 8 >> p)
    tl.store(codes + at, code.to(tl.uint8), mask=at < total)


@triton.jit
def _unpack_plane(packed, k, c, inside, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of this width holds of the codes k of the row."""
    SHIFT: tl.constexpr = BITS & -(2 * WIDTH)
    i, j = k // (WIDTH * c), k % (WIDTH * c)
    byte = tl.load(packed + SHIFT * c + j, mask=inside, other=0).to(tl.int32)
    return ((byte >> (i * WIDTH).to(tl.int32)) & ((1 << WIDTH) - 1)) << SHIFT
