"""Exponents in a fixed number of bits, P3 and P4: bit planes of s - base, and whole bytes for the symbols outside.

The simplest form, and the fastest where the processor has no instruction for more.

The layout. With b bits, a symbol s has the code s - base if that is 0 ... 2^b - 2, else 2^b - 1, and the byte itself
follows in `side`.

    table    u8 b (3 or 4), u8 base (0 ... 256 - 2^b), u8 0, u8 0
    stream   per group of 64 symbols b masks of 64 bits: bit 0 of the codes, bit 1, ...
    side     the escaped symbols, in order

`base` is where 2^b - 1 neighbours are most frequent. The last group is padded with it. An escape costs 8 bits and its
position none, as the masks tell it; patches (position and byte, over a window of 2^b) would cost 40, which makes P3 larger
by 0.03 of the original on trained weights in bfloat16.
"""

import torch
from torch import Tensor

from tersor.kernels.coding import (
    bit_planes,
    check_coded,
    check_symbols,
    from_bit_planes,
    histogram,
    nothing,
    padded,
    require,
    require_size,
    unknown_size,
    window,
)
from tersor.kernels.dispatch import op

ANOTHER_SIDE = "the stream escapes another number of symbols than side holds"


def make_table(like: Tensor, bits: int, base: int) -> Tensor:
    return torch.tensor([bits, base, 0, 0], dtype=torch.uint8, device=like.device)


def base_of(counts: list[int], bits: int) -> int:
    return window(counts, 2**bits - 1, 256 - 2**bits)


def open_table(table: Tensor, stream: Tensor, n: int) -> tuple[int, int]:
    """bits and base, once the sizes fit."""
    require_size("fixed_planes_decode", "table", table, 4 if n else 0)
    bits, base, *zeros = table.tolist() or [3, 0, 0, 0]
    require("fixed_planes_decode", bits in (3, 4) and base <= 256 - 2**bits and not any(zeros), "table is none")
    require_size("fixed_planes_decode", "stream", stream, padded(n) // 8 * bits)
    return bits, base


def escapes_of(stream: Tensor, bits: int) -> Tensor:
    """How many each group of 64 has."""
    return (from_bit_planes(stream, bits) == 2**bits - 1).sum(1)


def _check_encode(symbols: Tensor, bits: int = 3) -> None:
    check_symbols("fixed_planes_encode", symbols)
    if bits not in (3, 4):
        raise ValueError(f"fixed_planes_encode: bits must be 3 or 4, got {bits}")


def _check_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> None:
    check_coded("fixed_planes_decode", table, stream, side, n)


def _fake_encode(symbols: Tensor, bits: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    return symbols.new_empty(4 if n else 0), symbols.new_empty(padded(n) // 8 * bits), unknown_size(symbols)


@op(
    "(Tensor symbols, int bits=3) -> (Tensor table, Tensor stream, Tensor side)", check=_check_encode, fake=_fake_encode
)
def fixed_planes_encode(symbols: Tensor, bits: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(table, stream, side) of the bytes `symbols`, of any shape, in the layout above. No gradient (integers).

    >>> table, stream, side = fixed_planes_encode(torch.tensor([127, 126, 125, 124, 0], dtype=torch.uint8))
    >>> table.tolist(), side.tolist()
    ([3, 121, 0, 0], [0])
    >>> fixed_planes_decode(table, stream, side, 5).tolist()
    [127, 126, 125, 124, 0]
    """
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    base = base_of(histogram(symbols), bits)
    symbol = torch.nn.functional.pad(symbols.flatten(), (0, padded(n) - n), value=base).view(-1, 64)
    code = symbol.short() - base
    escaped = (code < 0) | (code > 2**bits - 2)
    code = code.masked_fill(escaped, 2**bits - 1)
    return make_table(symbols, bits, base), bit_planes(code, bits), symbol[escaped]


@op(
    "(Tensor table, Tensor stream, Tensor side, int n) -> Tensor",
    check=_check_decode,
    fake=lambda table, stream, side, n: table.new_empty(n),
)
def fixed_planes_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    """The `n` symbols, uint8, of what `fixed_planes_encode` returned. No gradient (integers).

    Raises:
        ValueError: the sizes of the tensors and the number of escapes contradict each other.
    """
    bits, base = open_table(table, stream, n)
    code = from_bit_planes(stream, bits)
    escaped = code == 2**bits - 1
    require("fixed_planes_decode", int(escaped.sum()) == side.numel(), ANOTHER_SIDE)
    symbols = code + base
    symbols[escaped] = side
    return symbols.flatten()[:n].clone()
