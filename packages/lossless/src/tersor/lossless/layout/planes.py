"""Byte planes: the i-th byte of every element side by side, so that bytes of one kind share one code."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

# dtypes of safetensors whose element is made of several bytes, and the bytes of their unit (C64 is two floats)
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "C64": 4, "F64": 8}
_INTEGERS = {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}

_BYTES, _PLANES, _ROTATED = 0, 1, 2


class Form(NamedTuple):
    """A layout as the file names it: `kind` 0 bytes in their order, 1 byte planes, 2 byte planes of rotated words.

    Planes go from the most significant byte to the least. In a rotated word the upper 16 bits are rotated left by one:
    the sign goes to bit 0 of plane 1, and plane 0 of bfloat16 and float32 is the exponent and nothing else.
    """

    kind: int
    width: int  # bytes per element = number of planes

    @property
    def valid(self) -> bool:
        return self == (_BYTES, 1) or (self.kind in (_PLANES, _ROTATED) and self.width in (2, 4, 8))

    def plane_name(self, plane: int) -> str:
        if self.kind == _ROTATED:
            return "exponent" if plane == 0 else "sign+mantissa"
        return "bytes"

    def split(self, block: np.ndarray) -> list[np.ndarray]:
        """The planes of `block`, uint8 (n * width,): `width` arrays uint8 (n,). `block` is only read."""
        if self.kind == _BYTES:
            return [block]
        words = block.view(f"<u{self.width}")
        shifts = reversed(range(0, 8 * (self.width - 2), 8))
        upper = (words >> 8 * (self.width - 2)).astype(np.uint16)
        if self.kind == _ROTATED:
            upper = upper << 1 | upper >> 15
        lower = [(words >> shift).astype(np.uint8) for shift in shifts]
        return [(upper >> 8).astype(np.uint8), upper.astype(np.uint8), *lower]

    def join(self, planes: list[np.ndarray], out: np.ndarray) -> None:
        """Undo `split` into `out`, uint8 (n * width,)."""
        if self.kind == _BYTES:
            out[:] = planes[0]
            return
        upper = planes[0].astype(np.uint16)
        upper <<= 8
        upper |= planes[1]
        if self.kind == _ROTATED:
            upper = upper >> 1 | upper << 15
        words = out.view(f"<u{self.width}")
        words[:] = upper
        for plane in planes[2:]:
            words <<= 8
            words |= plane


@runtime_checkable
class Layout(Protocol):
    def form(self, dtype: str) -> Form: ...


@dataclass(frozen=True)
class Raw:
    """Bytes in the order of the file."""

    def form(self, dtype: str) -> Form:
        return Form(_BYTES, 1)


@dataclass(frozen=True)
class BytePlanes:
    """Byte planes without rotation for every element of 2, 4 or 8 bytes; bytes as they are for the rest."""

    def form(self, dtype: str) -> Form:
        width = (_FLOATS | _INTEGERS).get(dtype, 1)
        return Form(_PLANES, width) if width > 1 else Form(_BYTES, 1)


@dataclass(frozen=True)
class ExponentSplit:
    """Floats of 2, 4 or 8 bytes rotated so that plane 0 holds the exponent; the rest as `BytePlanes`.

    Source: arXiv:2411.05239, section 3. Unlike its code, float16 is rotated too (plane 0: 5 bits of exponent, 3 of
    mantissa), the sign of float32 goes to the top of the mantissa and not below it (so weights that were bfloat16 leave
    two planes of zeros, as theirs do not), and the dtype is the tensor's own, never guessed. An 8-bit float stays one
    symbol: no code of sign, exponent and mantissa apart can beat their joint one.
    """

    def form(self, dtype: str) -> Form:
        if dtype in _FLOATS:
            return Form(_ROTATED, _FLOATS[dtype])
        return BytePlanes().form(dtype)
