"""Order-0 codes by the kernels, from the smallest (`Rans11`) to the fastest (`FixedPlanes`): made for exponents.

Each writes u64 symbols, u32 bytes of the table, u32 bytes of the stream; then the stream, the table and the side stream,
whose layouts are in `tersor.kernels.rans11` and so on. A plane that no such code can shrink, or one of equal bytes, has
neither table nor stream: the side stream is the plane itself, or its one byte.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# a multiple of 8 bytes: the stream, which comes first, then lies where it can be read as words
_HEAD = struct.Struct("<QII")
# bits per byte above which a plane is left alone: less than 1 % could be saved
_MAX_ENTROPY = 7.92


@dataclass(frozen=True)
class Rans11:
    """Range asymmetric numeral systems, R11: within 1 % of the order-0 entropy. The smallest, for any bytes.

    Source: arXiv:1311.2540; `tersor.kernels.rans11`.
    """

    id: ClassVar[int] = 2

    def encode(self, plane: memoryview) -> bytes:
        return _encode(plane, _op("rans11_encode"))

    @staticmethod
    def decode(stream: memoryview, n: int) -> memoryview:
        return _decode(stream, n, _op("rans11_decode"))


@dataclass(frozen=True)
class Prefix6:
    """Huffman codes of at most 6 bits, H6: some 1 % larger than `Rans11`, faster to decode. For up to 63 frequent bytes.

    Source: package-merge (Larmore and Hirschberg, 1990); `tersor.kernels.prefix6`.
    """

    id: ClassVar[int] = 3

    def encode(self, plane: memoryview) -> bytes:
        return _encode(plane, _op("prefix6_encode"))

    @staticmethod
    def decode(stream: memoryview, n: int) -> memoryview:
        return _decode(stream, n, _op("prefix6_decode"))


@dataclass(frozen=True)
class Tiered:
    """2 bits for three neighbouring bytes, 6 for fifteen others, 14 for the rest, T24: fast both ways, for exponents only.

    Source: `tersor.kernels.tiered`.
    """

    id: ClassVar[int] = 4

    def encode(self, plane: memoryview) -> bytes:
        return _encode(plane, _op("tiered_encode"))

    @staticmethod
    def decode(stream: memoryview, n: int) -> memoryview:
        return _decode(stream, n, _op("tiered_decode"))


@dataclass(frozen=True)
class FixedPlanes:
    """`bits` for 2^bits - 1 neighbouring bytes, 8 more for each of the rest, P3 and P4: the fastest, for exponents only.

    Source: `tersor.kernels.fixed_planes`.

    Args:
        bits: 3 or 4.
    """

    bits: int = 3

    id: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise ValueError(f"bits must be 3 or 4, got {self.bits}")

    def encode(self, plane: memoryview) -> bytes:
        return _encode(plane, partial(_op("fixed_planes_encode"), bits=self.bits))

    @staticmethod
    def decode(stream: memoryview, n: int) -> memoryview:
        return _decode(stream, n, _op("fixed_planes_decode"))


def _op(name: str) -> Callable[..., Any]:
    from tersor import kernels  # here: listing files and unpacking what others have coded should not wait for torch

    return getattr(kernels, name)


def _tensor(buffer: memoryview) -> "Tensor":
    """Its bytes, uint8 (n,): shared if they may be written to, else copied, as torch knows no read-only tensors."""
    import torch

    array = np.frombuffer(buffer, np.uint8)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _encode(plane: memoryview, encode: Callable[["Tensor"], tuple["Tensor", "Tensor", "Tensor"]]) -> bytes:
    symbols = _tensor(plane)
    entropy = _entropy(symbols.numpy()) if len(symbols) else 0.0
    table = stream = symbols[:0]
    if not len(symbols) or entropy > _MAX_ENTROPY:
        side = symbols
    elif entropy == 0 and (symbols == symbols[0]).all():
        side = symbols[:1]
    else:
        table, stream, side = encode(symbols)
    head = _HEAD.pack(len(symbols), len(table), len(stream))
    return b"".join([head, *(section.numpy().data for section in (stream, table, side))])


def _decode(coded: memoryview, n: int, decode: Callable[["Tensor", "Tensor", "Tensor", int], "Tensor"]) -> memoryview:
    if len(coded) < _HEAD.size:
        raise ValueError(f"coded plane of {len(coded)} bytes is shorter than its head")
    announced, table_nbytes, stream_nbytes = _HEAD.unpack_from(coded)
    if announced != n:
        raise ValueError(f"coded plane announces {announced} symbols, expected {n}")
    side_nbytes = len(coded) - _HEAD.size - table_nbytes - stream_nbytes
    if side_nbytes < 0:
        raise ValueError(f"coded plane ends {-side_nbytes} bytes before its sections")
    stream, table, side = _tensor(coded)[_HEAD.size :].split([stream_nbytes, table_nbytes, side_nbytes])
    if table_nbytes or stream_nbytes:
        symbols = decode(table, stream, side, n)
    elif side_nbytes == n or (side_nbytes == 1 and n):
        symbols = side.expand(n).contiguous()
    else:
        raise ValueError(f"plane of {side_nbytes} bytes that are not coded, expected {n}")
    return symbols.numpy().data


def _entropy(symbols: np.ndarray) -> float:
    """Order-0 entropy in bits per symbol: of all, or of 64 runs of 256 if there are more."""
    if symbols.size > 2**14:
        symbols = symbols[: symbols.size // 64 * 64].reshape(64, -1)[:, :256].ravel()
    counts = np.bincount(symbols)
    p = counts[counts > 0] / symbols.size
    return -float((p * np.log2(p)).sum())
