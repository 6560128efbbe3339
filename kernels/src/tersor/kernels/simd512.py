"""Vectors of 512 bits for Numba: what AVX-512 adds to `simd`, for processors that have it.

A register of integers is `i32x16`, whatever its lanes mean; floats are `f32x16`. Tables have 16 entries of float32, or
32 of bfloat16, and are looked up by the lowest bits of a lane: what stands above them need not be masked. Products of
bytes add up four at a time (VNNI), those of bfloat16 two at a time, both into sums of 32 bits.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import functools
import logging

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from tersor.kernels import simd
from tersor.kernels.cpu import jit
from tersor.kernels.simd import Vector, _address, _call, _emit, _i8, _i16, _i32, _load, _set, _shuffle, _splat, total_of

_log = logging.getLogger("tersor.kernels")

i32x16, f32x16 = Vector("i32", 16), Vector("f32", 16)
_i8x64, _i16x32 = ir.VectorType(_i8, 64), ir.VectorType(_i16, 32)


@intrinsic
def load(typing, address):
    return _emit(i32x16(_address), lambda builder, address: _load(builder, address, i32x16.llvm))


@intrinsic
def load_f32(typing, address):
    return _emit(f32x16(_address), lambda builder, address: _load(builder, address, f32x16.llvm))


@intrinsic
def load_i8_as_f32(typing, address):
    def instructions(builder, address):
        return builder.sitofp(_load(builder, address, ir.VectorType(_i8, 16)), f32x16.llvm)

    return _emit(f32x16(_address), instructions)


@intrinsic
def load_u8_as_f32(typing, address):
    def instructions(builder, address):
        # signed, which is one instruction: 255 is positive in 32 bits
        wide = builder.zext(_load(builder, address, ir.VectorType(_i8, 16)), i32x16.llvm)
        return builder.sitofp(wide, f32x16.llvm)

    return _emit(f32x16(_address), instructions)


@intrinsic
def store_f32(typing, address, vector):
    return _emit(types.void(_address, f32x16), _set)


@intrinsic
def zero(typing):
    return _emit(f32x16(), lambda builder: ir.Constant(f32x16.llvm, [0.0] * 16))


@intrinsic
def zero_i32(typing):
    return _emit(i32x16(), lambda builder: ir.Constant(i32x16.llvm, [0] * 16))


@intrinsic
def ones(typing):
    """All bits set."""
    return _emit(i32x16(), lambda builder: ir.Constant(i32x16.llvm, [-1] * 16))


@intrinsic
def splat(typing, value):
    return _emit(f32x16(types.float32), lambda builder, value: _splat(builder, value, 16))


@intrinsic
def rotate_right(typing, vector, shift):
    """Each 32 bits, by `shift` modulo 32."""

    def instructions(builder, vector, shift):
        shift = _splat(builder, builder.trunc(shift, _i32), 16)
        return _call(builder, "llvm.fshr.v16i32", i32x16.llvm, vector, vector, shift)

    return _emit(i32x16(i32x16, types.int64), instructions)


@intrinsic
def mask(typing, vector, bits):
    """vector & bits, of 32 bits each."""

    def instructions(builder, vector, bits):
        return builder.and_(vector, _splat(builder, builder.trunc(bits, _i32), 16))

    return _emit(i32x16(i32x16, types.int64), instructions)


@intrinsic
def flip(typing, vector, bits):
    """vector ^ bits, of 32 bits each."""

    def instructions(builder, vector, bits):
        return builder.xor(vector, _splat(builder, builder.trunc(bits, _i32), 16))

    return _emit(i32x16(i32x16, types.int64), instructions)


@intrinsic
def blend(typing, a, b, bits):
    """a & bits | b & ~bits, of 32 bits each."""

    def instructions(builder, a, b, bits):
        bits = _splat(builder, builder.trunc(bits, _i32), 16)
        return builder.or_(builder.and_(a, bits), builder.and_(b, builder.not_(bits)))

    return _emit(i32x16(i32x16, i32x16, types.int64), instructions)


@intrinsic
def lookup_f32(typing, table, index):
    """table[index modulo 16] of 16 lanes of 32 bits."""

    def instructions(builder, table, index):
        table = builder.bitcast(table, f32x16.llvm)
        found = _call(builder, "llvm.x86.avx512.permvar.sf.512", f32x16.llvm, table, index)
        return builder.bitcast(found, i32x16.llvm)

    return _emit(i32x16(i32x16, i32x16), instructions)


@intrinsic
def lookup_bf16(typing, table, index):
    """table[index modulo 32] of 32 lanes of 16 bits."""

    def instructions(builder, table, index):
        table, index = builder.bitcast(table, _i16x32), builder.bitcast(index, _i16x32)
        found = _call(builder, "llvm.x86.avx512.permvar.hi.512", _i16x32, table, index)
        return builder.bitcast(found, i32x16.llvm)

    return _emit(i32x16(i32x16, i32x16), instructions)


@intrinsic
def dot_bf16(typing, sums, a, b):
    """sums[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] of bfloat16."""

    def instructions(builder, sums, a, b):
        a, b = builder.bitcast(a, _i16x32), builder.bitcast(b, _i16x32)
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", f32x16.llvm, sums, a, b)

    return _emit(f32x16(f32x16, i32x16, i32x16), instructions)


@intrinsic
def dot_f32(typing, sums, a, b):
    """sums[i] + a[i] * b[i] of float32, rounded once."""

    def instructions(builder, sums, a, b):
        a, b = builder.bitcast(a, f32x16.llvm), builder.bitcast(b, f32x16.llvm)
        return _call(builder, "llvm.fma.v16f32", f32x16.llvm, a, b, sums)

    return _emit(f32x16(f32x16, i32x16, i32x16), instructions)


@intrinsic
def dot_bytes(typing, sums, a, b):
    """sums[i] and four products of bytes, those of `a` without and those of `b` with a sign; modulo 2^32."""
    return _emit(
        i32x16(i32x16, i32x16, i32x16),
        lambda builder, sums, a, b: _call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, sums, a, b),
    )


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once."""
    return _emit(
        f32x16(f32x16, f32x16, f32x16),
        lambda builder, a, b, c: _call(builder, "llvm.fma.v16f32", f32x16.llvm, a, b, c),
    )


@intrinsic
def add(typing, a, b):
    return _emit(f32x16(f32x16, f32x16), lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def sub(typing, a, b):
    return _emit(f32x16(f32x16, f32x16), lambda builder, a, b: builder.fsub(a, b))


@intrinsic
def add_i32(typing, a, b):
    return _emit(i32x16(i32x16, i32x16), lambda builder, a, b: builder.add(a, b))


@intrinsic
def mul(typing, a, b):
    return _emit(f32x16(f32x16, f32x16), lambda builder, a, b: builder.fmul(a, b))


@intrinsic
def negative(typing, vector):
    return _emit(f32x16(f32x16), lambda builder, vector: builder.fneg(vector))


@intrinsic
def to_f32(typing, vector):
    return _emit(f32x16(i32x16), lambda builder, vector: builder.sitofp(vector, f32x16.llvm))


@intrinsic
def total_i32(typing, vector):
    return _emit(
        types.int32(i32x16), lambda builder, vector: _call(builder, "llvm.vector.reduce.add.v16i32", _i32, vector)
    )


@intrinsic
def total(typing, vector):
    """The sum of the elements."""
    return _emit(types.float32(f32x16), lambda builder, vector: total_of(builder, vector))


@intrinsic
def expand_nibbles(typing, source, places, target):
    """Write 64 bytes to `target`: the nibbles at `source`, of which 32 bytes are read, at the set bits of `places`; else 0."""

    def instructions(builder, source, places, target):
        pairs = builder.zext(_load(builder, source, ir.VectorType(_i8, 32)), _i16x32)
        apart = builder.or_(pairs, builder.shl(pairs, _i16x32([4] * 32)))
        nibbles = builder.bitcast(builder.and_(apart, _i16x32([0x0F0F] * 32)), _i8x64)
        places = builder.bitcast(places, ir.VectorType(ir.IntType(1), 64))
        name, nothing = "llvm.x86.avx512.mask.expand.v64i8", ir.Constant(_i8x64, [0] * 64)
        _set(builder, target, _call(builder, name, _i8x64, nibbles, nothing, places))

    return _emit(types.void(types.uint64, types.uint64, types.uint64), instructions)


@intrinsic
def totals(typing, vectors):
    """The sums of the elements of each of 16 vectors."""

    def instructions(builder, vectors):
        parts = cgutils.unpack_tuple(builder, vectors)
        even, odd = (list(range(first, 32, 2)) for first in (0, 1))
        while len(parts) > 1:
            parts = [
                builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    return _emit(f32x16(types.UniTuple(f32x16, 16)), instructions)


def available(*features: str) -> bool:
    """Whether this processor has AVX-512 and `features` ("bf16", "vnni", "vbmi2"), and they do what they should."""
    return simd.available() and _sound(*features)


@functools.cache
def _sound(*features: str) -> bool:
    """Asked once, before the first use."""
    found = binding.get_host_cpu_features()
    if not all(found.get(f"avx512{name}") for name in ("f", "bw", "vl", "dq", *features)):
        return False
    try:
        sound = all(_TESTS[name]() for name in ("f", *features))
    except (NumbaError, RuntimeError) as error:  # LLVM's names of instructions change with its versions
        _log.warning("no vector code of 512 bits: %s", error)
        return False
    if not sound:
        _log.warning("no vector code of 512 bits: its self-test gives wrong numbers")
    return sound


def _test_lookup() -> bool:
    table, codes = np.linspace(-3, 5, 16, dtype=np.float32), np.arange(16, dtype=np.uint32) * np.uint32(2654435761)
    expected = np.square(table[codes >> 7 & 15].astype(np.float64)).sum()
    return abs(_try_lookup(table.ctypes.data, codes.ctypes.data) - expected) < 1e-3


def _test_bf16() -> bool:
    # small integers, whose upper halves are bfloat16
    table = (np.arange(-7, 25, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    codes = np.arange(32, dtype=np.uint16) * np.uint16(40503)
    expected = ((codes >> 3 & 31).astype(int) - 7) @ (np.arange(32) - 7)
    return _try_bf16(table.ctypes.data, codes.ctypes.data) == expected


def _test_bytes() -> bool:
    codes = np.arange(64, dtype=np.uint8) * np.uint8(37)
    return _try_bytes(codes.ctypes.data) == (codes.astype(int) @ codes.view(np.int8).astype(int))


def _test_expand() -> bool:
    nibbles, found = np.arange(32, dtype=np.uint8) * np.uint8(37), np.empty(64, np.uint8)
    places, expected = 0x8000F1E5_00C30001, np.zeros(64, np.uint8)
    lanes = [lane for lane in range(64) if places >> lane & 1]
    expected[lanes] = np.stack([nibbles & 15, nibbles >> 4], 1).flatten()[: len(lanes)]
    _try_expand(np.uint64(nibbles.ctypes.data), np.uint64(places), np.uint64(found.ctypes.data))
    return np.array_equal(found, expected)


_TESTS = {"f": _test_lookup, "bf16": _test_bf16, "vnni": _test_bytes, "vbmi2": _test_expand}


@jit()
def _try_lookup(table, codes):
    values = lookup_f32(load(table), rotate_right(load(codes), 7))
    return total(dot_f32(zero(), values, values))


@jit()
def _try_bf16(table, codes):
    # the rotated words take in what is not theirs above bit 12
    return total(dot_bf16(zero(), lookup_bf16(load(table), rotate_right(load(codes), 3)), load(table)))


@jit()
def _try_bytes(codes):
    return total(to_f32(dot_bytes(zero_i32(), load(codes), load(codes))))


@jit()
def _try_expand(nibbles, places, found):
    expand_nibbles(nibbles, places, found)
