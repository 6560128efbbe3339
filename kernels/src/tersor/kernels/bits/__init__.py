"""Codes of 1 to 8 bits in bytes.

The layout. Let c = ceil(n / 8) for a row of n codes, padded with zeros to 8 c. Write `bits` as a sum of powers of two,
the largest first: 3 = 2 + 1, 4 = 4, 7 = 4 + 2 + 1. Each of these widths w is a *plane* of w c bytes; the planes follow
each other, and the first one holds the lowest bits of the codes, the next one the bits above. Within a plane, byte j
holds w bits of the codes j, w c + j, 2 w c + j, ... (8 / w of them), the first in its lowest bits:

    4 bits: byte j         = code[j] | code[4 c + j] << 4                                                   (j < 4 c)
    3 bits: byte j         = low[j] | low[2 c + j] << 2 | low[4 c + j] << 4 | low[6 c + j] << 6             (j < 2 c)
            byte 2 c + j   = high[j] | high[c + j] << 1 | ... | high[7 c + j] << 7                          (j < c)
            with low = code & 3 and high = code >> 2
    8 bits: byte j         = code[j]

So neighbouring codes lie in neighbouring bytes: a vector of codes costs one load, one shift and one mask per plane.
"""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op


def planes(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of each plane: it holds bits shift ... shift + width - 1 of the codes.

    >>> planes(7)
    [(4, 0), (2, 4), (1, 6)]
    """
    return [(width, bits & -2 * width) for width in (8, 4, 2, 1) if bits & width]


def _check(name: str, codes: Tensor, bits: int, of: str) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{of}: bits must be 1 to 8, got {bits}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"{of}: {name} must be uint8, got {codes.dtype}; use {name}.to(torch.uint8)")
    if codes.dim() == 0:
        raise ValueError(f"{of}: {name} must have at least one dimension, got a scalar")


def _check_pack(codes: Tensor, bits: int) -> None:
    _check("codes", codes, bits, "pack_bits")


def _check_unpack(packed: Tensor, bits: int, n: int) -> None:
    _check("packed", packed, bits, "unpack_bits")
    if n < 0:
        raise ValueError(f"unpack_bits: n must not be negative, got {n}")
    nbytes = (n + 7) // 8 * bits
    if packed.shape[-1] != nbytes:
        raise ValueError(
            f"unpack_bits: {n} codes of {bits} bits take {nbytes} bytes, but packed holds {packed.shape[-1]} in its "
            "last dimension"
        )


def check_range(codes: Tensor, bits: int) -> None:
    """Each body calls it: it reads the codes, which `_check_pack` cannot do while `torch.compile` traces."""
    if bits < 8 and codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"pack_bits: codes of {bits} bits must be 0 to {2**bits - 1}, but the largest is {largest}")


@op(
    "(Tensor codes, int bits) -> Tensor",
    check=_check_pack,
    fake=lambda codes, bits: codes.new_empty(*codes.shape[:-1], (codes.shape[-1] + 7) // 8 * bits),
)
def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes (..., ceil(n / 8) * bits) of `codes` (..., n), in the layout above; the inverse of `unpack_bits`.

    Args:
        codes: uint8, 0 ... 2^bits - 1. On a GPU the check of this range waits for the device.
        bits: 1 to 8.

    >>> pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4)  # byte j: codes j and 4 + j
    tensor([ 81,  98, 115, 132], dtype=torch.uint8)
    """
    check_range(codes, bits)
    c = (codes.shape[-1] + 7) // 8
    codes = torch.nn.functional.pad(codes, (0, 8 * c - codes.shape[-1]))
    packed = codes.new_zeros(*codes.shape[:-1], c * bits)
    for width, shift in planes(bits):
        plane = packed[..., shift * c : (shift + width) * c]
        for i, field in enumerate(codes.unflatten(-1, (8 // width, width * c)).unbind(-2)):
            plane |= (field >> shift & 2**width - 1) << i * width
    return packed


@op(
    "(Tensor packed, int bits, int n) -> Tensor",
    check=_check_unpack,
    fake=lambda packed, bits, n: packed.new_empty(*packed.shape[:-1], n),
)
def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Codes (..., n), uint8, of `packed` (..., ceil(n / 8) * bits), in the layout above.

    >>> unpack_bits(torch.tensor([81, 98, 115, 132], dtype=torch.uint8), 4, 7)
    tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    """
    c = (n + 7) // 8
    codes = packed.new_zeros(*packed.shape[:-1], 8 * c)
    for width, shift in planes(bits):
        plane = packed[..., shift * c : (shift + width) * c]
        for i, field in enumerate(codes.unflatten(-1, (8 // width, width * c)).unbind(-2)):
            field |= (plane >> i * width & 2**width - 1) << shift
    return codes[..., :n].contiguous()
