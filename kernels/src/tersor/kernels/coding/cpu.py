"""What the coders' CPU bodies share: bits, words and vectors in registers.

64 symbols and their bit planes are vectors of LLVM's, for which it finds each processor's instructions. The bodies run in
one thread and release the GIL: several blocks are coded at a time by as many threads.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from tersor.kernels.cpu import array, jit

_u8, u64 = np.uint8, np.uint64

# SPREAD[b]: bit i of the byte b becomes the lowest bit of byte i
SPREAD = np.array([sum((b >> i & 1) << 8 * i for i in range(8)) for b in range(256)], dtype=np.uint64)


def _declared(builder, name: str, *operands):
    word = ir.IntType(64)
    function = ir.FunctionType(word, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)


@intrinsic
def popcount(typing, word):
    """Number of bits set."""

    def generate(context, builder, signature, args):
        return _declared(builder, "llvm.ctpop.i64", args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def trailing_zeros(typing, word):
    """Position of the lowest bit set; the word must not be 0."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def load(typing, address):
    """The 8 bytes at an address of any alignment."""

    def generate(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1)

    return types.uint64(types.uint64), generate


@intrinsic
def as_float(typing, bits):
    """The float32 with these bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _parallel_deposit(typing, word, mask):
    """The lowest bits of the word, one into each place that the mask names; an instruction of BMI2."""

    def generate(context, builder, signature, args):
        return _declared(builder, "llvm.x86.bmi.pdep.64", *args)

    return types.uint64(types.uint64, types.uint64), generate


@jit()
def _spread_one_by_one(nibbles, lanes):
    out = u64(0)
    while lanes:
        out |= (nibbles & u64(15)) * (lanes & (~lanes + u64(1)))
        nibbles >>= u64(4)
        lanes &= lanes - u64(1)
    return out


@jit()
def _spread_at_once(nibbles, lanes):
    return _parallel_deposit(nibbles, lanes * u64(15))


# spread_nibbles(nibbles, lanes): the lowest nibbles of a word, one into each byte whose lowest bit is set in `lanes`
spread_nibbles = _spread_at_once if llvmlite.binding.get_host_cpu_features().get("bmi2") else _spread_one_by_one


_SYMBOLS = ir.VectorType(ir.IntType(8), 64)


def _everywhere(builder, byte):
    one = builder.insert_element(ir.Constant(_SYMBOLS, ir.Undefined), byte, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64))


@intrinsic
def bit_plane(typing, address, base, largest, bit):
    """A bit of the codes min(symbol - base, largest) of the 64 symbols at the address, as a mask of 64 bits."""

    def generate(context, builder, signature, args):
        symbols = builder.load(builder.inttoptr(args[0], _SYMBOLS.as_pointer()), align=1)
        base, largest, bit = (_everywhere(builder, byte) for byte in args[1:])
        code = builder.sub(symbols, base)
        code = builder.select(builder.icmp_unsigned("<", code, largest), code, largest)
        bits = builder.icmp_unsigned("!=", builder.and_(code, bit), ir.Constant(_SYMBOLS, None))
        return builder.bitcast(bits, ir.IntType(64))

    return types.uint64(types.uint64, types.uint8, types.uint8, types.uint8), generate


def _from_planes(builder, masks, base):
    """base + the codes whose bits the masks hold, 64 bytes. The compiler finds each processor's instructions for it."""
    value = _everywhere(builder, base)
    for j, mask in enumerate(masks):
        one_more = builder.add(value, ir.Constant(_SYMBOLS, [1 << j] * 64))
        value = builder.select(builder.bitcast(mask, ir.VectorType(ir.IntType(1), 64)), one_more, value)
    return value


def _store_codes(context, builder, args):
    address, *masks, base = args
    value = _from_planes(builder, masks, base)
    builder.store(value, builder.inttoptr(address, _SYMBOLS.as_pointer()), align=1)
    return context.get_dummy_value()


@intrinsic
def store_codes3(typing, address, mask0, mask1, mask2, base):
    """base + code, at the address, for 64 codes in bit planes."""

    def generate(context, builder, signature, args):
        return _store_codes(context, builder, args)

    return types.void(*[types.uint64] * 4, types.uint8), generate


@intrinsic
def store_codes4(typing, address, mask0, mask1, mask2, mask3, base):
    def generate(context, builder, signature, args):
        return _store_codes(context, builder, args)

    return types.void(*[types.uint64] * 5, types.uint8), generate


@intrinsic
def merge_tiers(typing, address, low, high, base, base2):
    """64 bytes at the address: base2 is added where the code (its bits: low and high) is 3; else they become base + code.

    Returns the mask of those that were 15.
    """

    def generate(context, builder, signature, args):
        address, low, high, base, base2 = args
        pointer = builder.inttoptr(address, _SYMBOLS.as_pointer())
        nibble = builder.load(pointer, align=1)
        escaped = builder.bitcast(builder.and_(low, high), ir.VectorType(ir.IntType(1), 64))
        second = builder.add(nibble, _everywhere(builder, base2))
        builder.store(builder.select(escaped, second, _from_planes(builder, (low, high), base)), pointer, align=1)
        deep = builder.icmp_unsigned("==", nibble, ir.Constant(_SYMBOLS, [15] * 64))
        return builder.bitcast(deep, ir.IntType(64))

    return types.uint64(*[types.uint64] * 3, types.uint8, types.uint8), generate


def aligned(tensor: Tensor) -> np.ndarray:
    """Its bytes, at an address where they may be viewed as words."""
    tensor = tensor.contiguous()
    return array(tensor.clone() if tensor.data_ptr() % 8 else tensor)


def histogram(symbols: np.ndarray) -> list[int]:
    return _count(symbols).tolist()


@jit(nogil=True)
def _count(symbols):
    # four tables: equal neighbours do not wait for each other's sum
    counts = np.zeros((4, 256), np.int64)
    quarter = symbols.size // 4
    for i in range(quarter):
        for j in range(4):
            counts[j, symbols[4 * i + j]] += 1
    for i in range(4 * quarter, symbols.size):
        counts[0, symbols[i]] += 1
    return counts[0] + counts[1] + counts[2] + counts[3]


def pad(symbols: np.ndarray, value: int) -> np.ndarray:
    return np.pad(symbols, (0, -symbols.size % 128), constant_values=value) if symbols.size % 128 else symbols


def end_copy(stream: Tensor) -> np.ndarray:
    """128 bytes with the end of the stream in their middle, for loads that reach over it."""
    end = np.zeros(128, _u8)
    last = array(stream[-64:])
    end[64 - last.size : 64] = last
    return end
