"""A prefix code of at most 6 bits, H6: its decoding table has 64 entries, one vector register.

Source: length-limited Huffman codes by package-merge (Larmore and Hirschberg, JACM 37, 1990). The most frequent symbols
are *kept*, together with one escape that stands for the others; their bytes go to `side`. How many are kept is what makes
the whole shortest.

The layout. Codes are canonical (shorter first, then smaller symbols first) and written from their first bit on into the
lowest free bit of a *lane*: a buffer x of 32 bits, of which h are valid, 16 < h <= 32. A round is 128 symbols, two per
lane: position p = 4 l + v of the first 64 is the first symbol of lane 16 v + l, position 64 + p its second. To decode,

    twice:       s = the symbol whose code x begins with, L its length;  x = x >> L,  h = h - L
    if h <= 16:  x = x | word << h,  h = h + 16,  with the stream's next word

where lanes take words in their order. The encoder walks backwards, from x = 0 and h = 17 in each lane.

    table    u8 entries, u8 escape, u8 0, u8 0; per entry, the escape among them, u8 symbol, u8 length, in canonical order
    stream   64 x u8 h, 64 x u32 x, u16 words
    side     the bytes of the escaped symbols, in order

`escape` is a byte that is not kept. The end is padded with the shortest kept symbol.
"""

import torch
from torch import Tensor

from tersor.kernels.coding import (
    check_coded,
    check_symbols,
    histogram,
    nothing,
    padded,
    require,
    require_size,
    unknown_size,
)
from tersor.kernels.dispatch import op

MAX_LENGTH = 6
LANES = 64
FIRST_LENGTH = 17  # of each lane, for the encoder

WORDS_LEFT = "the words of the stream do not lead back to the encoder's empty lanes"
ANOTHER_SIDE = "the stream escapes another number of symbols than side holds"

# 6 bits read from the other end
REVERSED = [int(f"{i:06b}"[::-1], 2) for i in range(64)]


def code_lengths(weights: list[int]) -> list[int]:
    """Lengths, 1 to 6, of the code that minimises sum(weight * length), for 2 to 64 ascending weights."""
    # an entry is 2 * its weight, plus 1 if it is a package of two entries of the level below
    items = [2 * weight for weight in weights]
    levels = [items]
    for _ in range(MAX_LENGTH - 1):
        below = levels[-1]
        packages = [(a & ~1) + (b & ~1) + 1 for a, b in zip(below[::2], below[1::2], strict=False)]
        levels.append(sorted(items + packages))
    lengths = [0] * len(weights)
    taken = 2 * len(weights) - 2
    for level in reversed(levels):
        packages = sum(entry & 1 for entry in level[:taken])
        for i in range(taken - packages):
            lengths[i] += 1
        taken = 2 * packages
    return lengths


def code(counts: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """(escape, (length, symbol) in canonical order) for symbols that occur this often."""
    by_count = sorted((s for s in range(256) if counts[s]), key=lambda s: (-counts[s], s))
    total = sum(counts)
    best, best_cost, rises = (0, []), 8 * total + 1, 0
    for kept in range(1, min(len(by_count), 2**MAX_LENGTH - 1) + 1):
        symbols = by_count[:kept]
        escape = min(set(range(kept + 1)) - set(symbols))
        escapes = total - sum(counts[s] for s in symbols)
        ascending = sorted([(counts[s], s) for s in symbols] + [(escapes, escape)])
        lengths = code_lengths([weight for weight, _ in ascending])
        cost = 8 * escapes + sum(weight * length for (weight, _), length in zip(ascending, lengths, strict=True))
        if not best[1] or cost < best_cost:
            best, best_cost, rises = (escape, sorted(zip(lengths, (s for _, s in ascending), strict=True))), cost, 0
        else:
            rises += 1
            if rises == 4:
                break
    return best


def make_table(like: Tensor, escape: int, entries: list[tuple[int, int]]) -> Tensor:
    pairs = [byte for length, symbol in entries for byte in (symbol, length)]
    return torch.tensor([len(entries), escape, 0, 0, *pairs], dtype=torch.uint8, device=like.device)


def open_table(table: Tensor, stream: Tensor, side: Tensor, n: int) -> tuple[int, list[tuple[int, int]]]:
    """escape and (length, symbol) in canonical order, once they and the sizes fit."""
    of = "prefix6_decode"
    if n == 0:
        for name, tensor in (("table", table), ("stream", stream), ("side", side)):
            require_size(of, name, tensor, 0)
        return 0, []
    numbers = table.tolist()
    require(of, len(numbers) >= 8, f"table has {len(numbers)} bytes, at least 8 are needed")
    require_size(of, "table", table, 4 + 2 * numbers[0])
    entries = list(zip(numbers[5::2], numbers[4::2], strict=True))
    symbols = {symbol for _, symbol in entries}
    require(of, numbers[2] == numbers[3] == 0 and entries == sorted(entries), "table is not in order")
    require(of, len(symbols) == len(entries) and numbers[1] in symbols, "table has a symbol twice, or no escape")
    require(of, all(1 <= length <= MAX_LENGTH for length, _ in entries), "a code is not 1 to 6 bits long")
    kraft = sum(2**MAX_LENGTH >> length for length, _ in entries)
    require(of, kraft == 2**MAX_LENGTH, f"the Kraft sum of the codes is {kraft} / 64")
    words = stream.numel() - 5 * LANES
    require(of, words >= 0 and words % 2 == 0, f"stream has {stream.numel()} bytes, not 320 + 2 per word")
    require(of, words // 2 <= padded(n), "stream has more words than symbols")
    require(of, side.numel() <= n, "side has more bytes than there are symbols")
    return numbers[1], entries


def decoding_table(entries: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Symbol and length for each 6 bits that a lane may begin with."""
    in_order = [entry for entry in entries for _ in range(2**MAX_LENGTH >> entry[0])]
    by_bits = [in_order[bits] for bits in REVERSED]
    return [symbol for _, symbol in by_bits], [length for length, _ in by_bits]


def encoding_table(escape: int, entries: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Code and length of each byte; that of the escape for those that are not kept."""
    first = 0
    codes: dict[int, tuple[int, int]] = {}
    for length, symbol in entries:
        codes[symbol] = REVERSED[first], length
        first += 2**MAX_LENGTH >> length
    of_byte = [codes.get(symbol, codes[escape]) for symbol in range(256)]
    return [bits for bits, _ in of_byte], [length for _, length in of_byte]


def padding(escape: int, entries: list[tuple[int, int]]) -> int:
    """The shortest kept symbol."""
    return next(symbol for _, symbol in entries if symbol != escape)


def _lanes(symbols: Tensor) -> Tensor:
    """The symbols as (rounds, first or second, lane)."""
    return symbols.view(-1, 2, LANES // 4, 4).transpose(2, 3).reshape(-1, 2, LANES)


def _in_order(lanes: Tensor) -> Tensor:
    return lanes.view(-1, 2, 4, LANES // 4).transpose(2, 3).flatten()


def _check_encode(symbols: Tensor) -> None:
    check_symbols("prefix6_encode", symbols)


def _check_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> None:
    check_coded("prefix6_decode", table, stream, side, n)


def _fake_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return unknown_size(symbols), unknown_size(symbols), unknown_size(symbols)


@op("(Tensor symbols) -> (Tensor table, Tensor stream, Tensor side)", check=_check_encode, fake=_fake_encode)
def prefix6_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(table, stream, side) of the bytes `symbols`, of any shape, in the layout above. No gradient (integers).

    >>> table, stream, side = prefix6_encode(torch.tensor([7, 7, 7, 200], dtype=torch.uint8))
    >>> table.tolist()  # 7 and 200 are kept; the escape, 0, does not occur
    [3, 0, 0, 0, 7, 1, 0, 2, 200, 2]
    >>> prefix6_decode(table, stream, side, 4)
    tensor([  7,   7,   7, 200], dtype=torch.uint8)
    """
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    escape, entries = code(histogram(symbols))
    kept = torch.zeros(256, dtype=torch.bool)
    kept[[symbol for _, symbol in entries if symbol != escape]] = True
    flat = symbols.flatten()
    rounds = _lanes(torch.nn.functional.pad(flat, (0, padded(n) - n), value=padding(escape, entries))).long()
    bits, length = (torch.tensor(column, device=symbols.device) for column in encoding_table(escape, entries))
    x = torch.zeros(LANES, dtype=torch.long, device=symbols.device)
    h = torch.full_like(x, FIRST_LENGTH)
    words = []
    for first, second in rounds.flip(0):
        full = h + length[first] + length[second] > 32
        words.append((x >> (h - 16))[full].flip(0))
        h = torch.where(full, h - 16, h)
        x = torch.where(full, x & (1 << h) - 1, x)
        for symbol in (second, first):
            x = x << length[symbol] | bits[symbol]
            h = h + length[symbol]
    word = torch.cat(words).flip(0).to(torch.int16)
    stream = torch.cat([h.to(torch.uint8), x.to(torch.int32).view(torch.uint8), word.view(torch.uint8)])
    return make_table(symbols, escape, entries), stream, flat[~kept.to(flat.device)[flat.long()]]


@op(
    "(Tensor table, Tensor stream, Tensor side, int n) -> Tensor",
    check=_check_decode,
    fake=lambda table, stream, side, n: table.new_empty(n),
)
def prefix6_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    """The `n` symbols, uint8, of what `prefix6_encode` returned. No gradient (integers).

    Raises:
        ValueError: the table is no complete code, or the words do not lead back to the encoder's empty lanes.
    """
    escape, entries = open_table(table, stream, side, n)
    if n == 0:
        return table.new_empty(0)
    symbol_of, length_of = (torch.tensor(column, device=table.device) for column in decoding_table(entries))
    stream = stream.clone()  # at an address where it may be viewed as words
    h = stream[:LANES].long()
    x = stream[LANES : 5 * LANES].view(torch.int32).long() & 2**32 - 1
    words = stream[5 * LANES :].view(torch.int16).long() & 2**16 - 1
    require("prefix6_decode", bool(((h > 16) & (h <= 32) & (x >> h == 0)).all()), "a lane has too few or too many bits")
    at = 0
    rounds = []
    for _ in range(padded(n) // (2 * LANES)):
        for _ in range(2):
            rounds.append(symbol_of[x & 63])
            length = length_of[x & 63]
            x, h = x >> length, h - length
        empty = h <= 16
        count = int(empty.sum())
        require("prefix6_decode", at + count <= len(words), WORDS_LEFT)
        x[empty] |= words[at : at + count] << h[empty]
        h[empty] += 16
        at += count
    ended = at == len(words) and bool((x == 0).all()) and bool((h == FIRST_LENGTH).all())
    require("prefix6_decode", ended, WORDS_LEFT)
    symbols = _in_order(torch.cat(rounds)).to(torch.uint8)
    escaped = symbols == escape
    require("prefix6_decode", int(escaped.sum()) == side.numel(), ANOTHER_SIDE)
    symbols[escaped] = side
    return symbols[:n].clone()
