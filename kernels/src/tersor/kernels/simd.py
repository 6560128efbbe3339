"""Vectors of 256 bits for Numba: what LLVM does not find in plain loops.

Numba's vector code comes from scalar loops, in which no compiler sees a table look-up or a product of bytes. Here
vectors are values of their own, `u8x32` or `f32x8`, and each primitive is an instruction or two; a kernel made of them
reads like the loop that it replaces. Addresses are plain integers (`tensor.data_ptr()`), which cost a call less than
arrays do, but nobody checks their bounds. `lookup`, the sums of products and `sums_of_eight` are AVX2's, the rest is
portable: a body asks `available()` first and falls back on plain loops, or on PyTorch.

The primitives are intrinsics of the module, because Numba keeps no machine code on disk for those made in closures.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import functools
import logging

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.errors import NumbaError
from numba.extending import intrinsic, models, register_model

from tersor.kernels.cpu import jit

_log = logging.getLogger("tersor.kernels")

_i8, _i16, _i32, _i64, _float = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_ELEMENTS = {"u8": _i8, "i16": _i16, "i32": _i32, "i64": _i64, "f32": _float}


class Vector(types.Type):
    """`count` elements of one type, in a register."""

    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(f"{element}x{count}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.element], self.count)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


u8x32, i16x16, i32x8, i64x4, f32x8 = (
    Vector(element, 256 // width) for element, width in (("u8", 8), ("i16", 16), ("i32", 32), ("i64", 64), ("f32", 32))
)
_address = types.int64


def _emit(signature, instructions):
    """What an intrinsic returns: its types, and the function that writes it with an LLVM builder."""

    def codegen(context, builder, signature, args):
        value = instructions(builder, *args)
        return context.get_dummy_value() if signature.return_type == types.void else value

    return signature, codegen


def _call(builder, name, result, *args):
    function_type = ir.FunctionType(result, [value.type for value in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _load(builder, address, llvm_type):
    # an alignment of 1: slices of tensors and rows of codes start anywhere
    return builder.load(builder.inttoptr(address, llvm_type.as_pointer()), align=1)


def _set(builder, address, value):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_i32, len(order)), order))


def total_of(builder, vector):
    """The sum of float32 in any order."""
    function_type = ir.FunctionType(_float, [_float, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    reduce = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(reduce, [ir.Constant(_float, -0.0), vector], fastmath=("reassoc",))


def _splat(builder, value, count):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, _i32(0))
    return _shuffle(builder, one, one, [0] * count)


@intrinsic
def load_u8(typing, address):
    return _emit(u8x32(_address), lambda builder, address: _load(builder, address, u8x32.llvm))


@intrinsic
def load_f32(typing, address):
    return _emit(f32x8(_address), lambda builder, address: _load(builder, address, f32x8.llvm))


@intrinsic
def load_i16(typing, address):
    return _emit(i16x16(_address), lambda builder, address: _load(builder, address, i16x16.llvm))


@intrinsic
def load_i8_as_i16(typing, address):
    def instructions(builder, address):
        return builder.sext(_load(builder, address, ir.VectorType(_i8, 16)), i16x16.llvm)

    return _emit(i16x16(_address), instructions)


@intrinsic
def load_u8_as_i16(typing, address):
    def instructions(builder, address):
        return builder.zext(_load(builder, address, ir.VectorType(_i8, 16)), i16x16.llvm)

    return _emit(i16x16(_address), instructions)


@intrinsic
def load_low_halves(typing, address):
    """Of 16 bytes, 16 times the signed number in the lower half of each."""

    def instructions(builder, address):
        upper = builder.shl(_load(builder, address, ir.VectorType(_i8, 16)), ir.VectorType(_i8, 16)([4] * 16))
        return builder.sext(upper, i16x16.llvm)

    return _emit(i16x16(_address), instructions)


@intrinsic
def load_high_halves(typing, address):
    """Of 16 bytes, 16 times the signed number in the upper half of each."""

    def instructions(builder, address):
        upper = builder.and_(_load(builder, address, ir.VectorType(_i8, 16)), ir.VectorType(_i8, 16)([0xF0] * 16))
        return builder.sext(upper, i16x16.llvm)

    return _emit(i16x16(_address), instructions)


@intrinsic
def load_i8_as_f32(typing, address):
    def instructions(builder, address):
        return builder.sitofp(_load(builder, address, ir.VectorType(_i8, 8)), f32x8.llvm)

    return _emit(f32x8(_address), instructions)


@intrinsic
def store_f32(typing, address, vector):
    return _emit(types.void(_address, f32x8), _set)


@intrinsic
def float32_at(typing, address):
    return _emit(types.float32(_address), lambda builder, address: _load(builder, address, _float))


@intrinsic
def bits_at(typing, address):
    """The 32 bits of a float32."""
    return _emit(types.uint32(_address), lambda builder, address: _load(builder, address, _i32))


@intrinsic
def scalar_at(typing, address, itemsize, index):
    """Element `index` of an array as a float32. `itemsize`: 4 for float32, 2 for float16, -2 for bfloat16."""

    def instructions(builder, address, itemsize, index):
        def at(nbytes, llvm_type):
            return _load(builder, builder.add(address, builder.mul(index, index.type(nbytes))), llvm_type)

        result = cgutils.alloca_once(builder, _float)
        with builder.if_else(builder.icmp_signed("==", itemsize, itemsize.type(4))) as (float32, shorter):
            with float32:
                builder.store(at(4, _float), result)
            with shorter, builder.if_else(builder.icmp_signed("==", itemsize, itemsize.type(2))) as (float16, bfloat16):
                with float16:
                    builder.store(builder.fpext(at(2, ir.HalfType()), _float), result)
                with bfloat16:
                    bits = builder.shl(builder.zext(at(2, _i16), _i32), _i32(16))
                    builder.store(builder.bitcast(bits, _float), result)
        return builder.load(result)

    return _emit(types.float32(_address, types.int64, types.int64), instructions)


@intrinsic
def prefetch(typing, address):
    """A hint, also for addresses that nobody may read."""

    def instructions(builder, address):
        pointer = builder.inttoptr(address, _i8.as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, _i32(0), _i32(3), _i32(1)])  # to read, into every cache, data

    return _emit(types.void(_address), instructions)


@intrinsic
def int8_at(typing, address):
    return _emit(types.int8(_address), lambda builder, address: _load(builder, address, _i8))


@intrinsic
def int16_at(typing, address):
    return _emit(types.int16(_address), lambda builder, address: _load(builder, address, _i16))


@intrinsic
def uint8_at(typing, address):
    """As a word of 64 bits."""
    return _emit(types.uint64(_address), lambda builder, address: builder.zext(_load(builder, address, _i8), _i64))


@intrinsic
def uint64_at(typing, address):
    return _emit(types.uint64(_address), lambda builder, address: _load(builder, address, _i64))


@intrinsic
def int32_at(typing, address):
    return _emit(types.int32(_address), lambda builder, address: _load(builder, address, _i32))


@intrinsic
def int64_at(typing, address):
    return _emit(types.int64(_address), lambda builder, address: _load(builder, address, _i64))


@intrinsic
def set_float32(typing, address, value):
    return _emit(types.void(_address, types.float32), _set)


@intrinsic
def set_int16(typing, address, value):
    return _emit(types.void(_address, types.int16), _set)


@intrinsic
def set_int32(typing, address, value):
    return _emit(types.void(_address, types.int32), _set)


@intrinsic
def set_int64(typing, address, value):
    return _emit(types.void(_address, types.int64), _set)


@intrinsic
def zero_bytes(typing):
    return _emit(u8x32(), lambda builder: ir.Constant(u8x32.llvm, [0] * 32))


@intrinsic
def zero_int16(typing):
    return _emit(i16x16(), lambda builder: ir.Constant(i16x16.llvm, [0] * 16))


@intrinsic
def zero_int32(typing):
    return _emit(i32x8(), lambda builder: ir.Constant(i32x8.llvm, [0] * 8))


@intrinsic
def zero_int64(typing):
    return _emit(i64x4(), lambda builder: ir.Constant(i64x4.llvm, [0] * 4))


@intrinsic
def splat(typing, value):
    return _emit(f32x8(types.float32), lambda builder, value: _splat(builder, value, 8))


@intrinsic
def halves(typing, low, high):
    """`low` four times, then `high` four times."""

    def instructions(builder, low, high):
        return _shuffle(builder, _splat(builder, low, 4), _splat(builder, high, 4), list(range(8)))

    return _emit(f32x8(types.float32, types.float32), instructions)


@intrinsic
def shift_and_mask(typing, vector, shift, mask):
    """(vector >> shift) & mask of each byte, for a mask of at most 8 - shift bits."""

    def instructions(builder, vector, shift, mask):
        # there are no shifts of bytes, but the mask removes what comes from the neighbour
        shift = _splat(builder, builder.trunc(shift, _i16), 16)
        shifted = builder.bitcast(builder.lshr(builder.bitcast(vector, i16x16.llvm), shift), u8x32.llvm)
        return builder.and_(shifted, _splat(builder, builder.trunc(mask, _i8), 32))

    return _emit(u8x32(u8x32, types.int64, types.int64), instructions)


@intrinsic
def add_u8(typing, a, b):
    return _emit(u8x32(u8x32, u8x32), lambda builder, a, b: builder.add(a, b))


@intrinsic
def and_u8(typing, a, b):
    return _emit(u8x32(u8x32, u8x32), lambda builder, a, b: builder.and_(a, b))


@intrinsic
def xor_u8(typing, a, b):
    return _emit(u8x32(u8x32, u8x32), lambda builder, a, b: builder.xor(a, b))


@intrinsic
def count_ones(typing, vector):
    """How many bits of each byte are set."""
    return _emit(u8x32(u8x32), lambda builder, vector: _call(builder, "llvm.ctpop.v32i8", u8x32.llvm, vector))


@intrinsic
def ones_of_word(typing, word):
    """How many bits of 64 are set."""
    return _emit(types.int64(types.uint64), lambda builder, word: _call(builder, "llvm.ctpop.i64", _i64, word))


@intrinsic
def sums_of_eight(typing, vector):
    """Sums of each eight neighbouring bytes."""

    def instructions(builder, vector):
        return _call(builder, "llvm.x86.avx2.psad.bw", i64x4.llvm, vector, ir.Constant(u8x32.llvm, [0] * 32))

    return _emit(i64x4(u8x32), instructions)


@intrinsic
def lookup(typing, table, index):
    """table[index] for indices 0 to 15; both halves of `table` hold the same 16 bytes."""
    return _emit(
        u8x32(u8x32, u8x32),
        lambda builder, table, index: _call(builder, "llvm.x86.avx2.pshuf.b", u8x32.llvm, table, index),
    )


def _interleave(builder, a, b, count, high):
    """The lower or higher part of each half of `a` and `b` as vectors of `count`, by turns."""
    starts = [half * count // 2 + high * count // 4 for half in (0, 1)]
    order = [start + i + operand * count for start in starts for i in range(count // 4) for operand in (0, 1)]
    vector = ir.VectorType(ir.IntType(256 // count), count)
    return _shuffle(builder, builder.bitcast(a, vector), builder.bitcast(b, vector), order)


@intrinsic
def floats(typing, byte_0, byte_1, byte_2, byte_3):
    """32 float32 from their bytes, the lowest first: four vectors, in `FLOATS_ORDER`."""

    def codegen(context, builder, signature, args):
        byte_0, byte_1, byte_2, byte_3 = args
        words = [
            (_interleave(builder, byte_0, byte_1, 32, high), _interleave(builder, byte_2, byte_3, 32, high))
            for high in (0, 1)
        ]
        vectors = [_interleave(builder, *pair, 16, high) for pair in words for high in (0, 1)]
        vectors = [builder.bitcast(vector, f32x8.llvm) for vector in vectors]
        return context.make_tuple(builder, signature.return_type, vectors)

    return types.UniTuple(f32x8, 4)(u8x32, u8x32, u8x32, u8x32), codegen


# the machine interleaves halves of vectors: 0 1 2 3 16 17 18 19, 4 5 6 7 20 21 22 23, ...
FLOATS_ORDER = tuple(16 * half + 4 * vector + i for vector in range(4) for half in range(2) for i in range(4))


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once."""
    return _emit(
        f32x8(f32x8, f32x8, f32x8), lambda builder, a, b, c: _call(builder, "llvm.fma.v8f32", f32x8.llvm, a, b, c)
    )


@intrinsic
def add(typing, a, b):
    return _emit(f32x8(f32x8, f32x8), lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def sub(typing, a, b):
    return _emit(f32x8(f32x8, f32x8), lambda builder, a, b: builder.fsub(a, b))


@intrinsic
def mul(typing, a, b):
    return _emit(f32x8(f32x8, f32x8), lambda builder, a, b: builder.fmul(a, b))


@intrinsic
def to_f32(typing, vector):
    return _emit(f32x8(i32x8), lambda builder, vector: builder.sitofp(vector, f32x8.llvm))


@intrinsic
def add_i16(typing, a, b):
    return _emit(i16x16(i16x16, i16x16), lambda builder, a, b: builder.add(a, b))


@intrinsic
def add_i32(typing, a, b):
    return _emit(i32x8(i32x8, i32x8), lambda builder, a, b: builder.add(a, b))


@intrinsic
def add_i64(typing, a, b):
    return _emit(i64x4(i64x4, i64x4), lambda builder, a, b: builder.add(a, b))


@intrinsic
def shift_left(typing, vector, shift):
    return _emit(
        i64x4(i64x4, types.int64), lambda builder, vector, shift: builder.shl(vector, _splat(builder, shift, 4))
    )


@intrinsic
def shift_and_scale(typing, vector, shift, scale):
    """(vector >> shift) * scale, modulo 2^32."""

    def instructions(builder, vector, shift, scale):
        shifted = builder.ashr(vector, _splat(builder, builder.trunc(shift, _i32), 8))
        return builder.mul(shifted, _splat(builder, builder.trunc(scale, _i32), 8))

    return _emit(i32x8(i32x8, types.int64, types.int64), instructions)


@intrinsic
def pair_products(typing, a, b):
    """a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]; exact for bytes."""
    return _emit(
        i32x8(i16x16, i16x16), lambda builder, a, b: _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, a, b)
    )


@intrinsic
def byte_products(typing, a, b):
    """a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] of bytes, those of `a` without and those of `b` with a sign; saturated."""
    return _emit(
        i16x16(u8x32, u8x32), lambda builder, a, b: _call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, a, b)
    )


@intrinsic
def pair_sums(typing, vector):
    """vector[2 i] + vector[2 i + 1]."""

    def instructions(builder, vector):
        return _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, vector, ir.Constant(i16x16.llvm, [1] * 16))

    return _emit(i32x8(i16x16), instructions)


@intrinsic
def total_i32(typing, vector):
    return _emit(
        types.int32(i32x8), lambda builder, vector: _call(builder, "llvm.vector.reduce.add.v8i32", _i32, vector)
    )


@intrinsic
def total_i64(typing, vector):
    return _emit(
        types.int64(i64x4), lambda builder, vector: _call(builder, "llvm.vector.reduce.add.v4i64", _i64, vector)
    )


@intrinsic
def total(typing, vector):
    """The sum of the elements."""

    return _emit(types.float32(f32x8), total_of)


@functools.cache
def available() -> bool:
    """Whether this processor has the instructions and they do what they should: asked once, before the first use."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("avx2", "fma", "f16c")):
        return False
    codebook, out = np.linspace(-3, 5, 16, dtype=np.float32), np.empty(32, np.float32)
    tables = np.tile(codebook.view(np.uint8).reshape(16, 4).T, 2)
    packed = np.arange(32, dtype=np.uint8) * np.uint8(37)
    expected = codebook[packed >> 3 & 15][list(FLOATS_ORDER)]
    try:
        squares = _try(tables.ctypes.data, packed.ctypes.data, out.ctypes.data)
    except (NumbaError, RuntimeError) as error:  # LLVM's names of instructions change with its versions
        _log.warning("no vector code: %s", error)
        return False
    sound = np.array_equal(out, expected) and abs(squares - np.square(expected).sum()) < 1e-3
    if not sound:
        _log.warning("no vector code: its self-test gives wrong numbers")
    return sound


@jit()
def _try(tables, packed, out):
    codes = shift_and_mask(load_u8(packed), 3, 15)
    squares = splat(np.float32(0))
    for i, vector in enumerate(
        floats(
            lookup(load_u8(tables), codes),
            lookup(load_u8(tables + 32), codes),
            lookup(load_u8(tables + 64), codes),
            lookup(load_u8(tables + 96), codes),
        )
    ):
        store_f32(out + 32 * i, vector)
        squares = fma(vector, vector, squares)
    return total(squares)
