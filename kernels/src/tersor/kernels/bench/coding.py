"""Coders of weights in bfloat16: both planes, encoded from the numbers and decoded back to them, blocks of 2^20 in turn.

All of them use one thread. Rates and sizes are of the original bytes.
"""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.bench import peers
from tersor.kernels.bench.case import Call, Case, Prepare, copies, ours
from tersor.kernels.compressed_linear import compressed_linear, compressed_weight
from tersor.kernels.fixed_planes import fixed_planes_decode, fixed_planes_encode
from tersor.kernels.planes import plane_merge, plane_split
from tersor.kernels.prefix6 import prefix6_decode, prefix6_encode
from tersor.kernels.rans11 import rans11_decode, rans11_encode
from tersor.kernels.tiered import tiered_decode, tiered_encode

BF16 = torch.bfloat16
BLOCK = 2**20
MOST_BLOCKS = 8


class Coder(NamedTuple):
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], object]


def _in_planes(encode: Callable[[Tensor], Any], decode: Callable[..., Tensor]) -> Coder:
    """A coder of the exponents; the rest stays as it is."""

    def both(weights: Tensor) -> tuple[Any, Tensor]:
        first, rest = plane_split(weights)
        return encode(first), rest

    def back(coded: tuple[Any, Tensor]) -> Tensor:
        symbols, rest = coded
        return plane_merge(decode(*symbols, rest.numel()), rest, BF16)

    return Coder(both, back)


OURS = {
    "fixed_planes 3 bits": _in_planes(fixed_planes_encode, fixed_planes_decode),
    "fixed_planes 4 bits": _in_planes(lambda first: fixed_planes_encode(first, 4), fixed_planes_decode),
    "tiered": _in_planes(tiered_encode, tiered_decode),
    "prefix6": _in_planes(prefix6_encode, prefix6_decode),
    "rans11": _in_planes(rans11_encode, rans11_decode),
}

# bytes per second that prototypes of the formats decoded on one core with AVX-512; ours is to be within 20 %
PROTOTYPES = {
    "fixed_planes 3 bits": {"prototype, AVX2": 5.4e9},
    "fixed_planes 4 bits": {"prototype, portable": 3.1e9},
    "tiered": {"prototype, AVX-512": 15e9},
    "prefix6": {"prototype, portable": 0.65e9},
    "rans11": {"prototype, portable": 0.7e9},
}


def _bytes(weights: Tensor) -> np.ndarray:
    return weights.view(torch.uint8).numpy()


def _zstandard(level: int) -> Coder:
    zstandard = peers.peer("zstandard", "zstandard")
    pack, unpack = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Coder(lambda weights: pack.compress(_bytes(weights)), unpack.decompress)


def _zstandard_exponents(level: int) -> Coder:
    pack, unpack = _zstandard(level)

    def decode(coded: bytes, n: int) -> Tensor:
        return torch.frombuffer(bytearray(unpack(coded)), dtype=torch.uint8)  # type: ignore[arg-type]

    return _in_planes(lambda first: (pack(first),), decode)


def _zipnn() -> Coder:
    zipnn = peers.peer("zipnn", "zipnn").ZipNN(bytearray_dtype="bfloat16", threads=1)
    # it reorders its input in place
    return Coder(lambda weights: zipnn.compress(bytearray(_bytes(weights))), zipnn.decompress)


OTHERS: dict[str, Callable[[], Coder]] = {
    "ZipNN": _zipnn,
    "zstandard 1": partial(_zstandard, 1),
    "zstandard 3": partial(_zstandard, 3),
    "zstandard 1, exponents": partial(_zstandard_exponents, 1),
    "zstandard 3, exponents": partial(_zstandard_exponents, 3),
    "planes alone": partial(_in_planes, lambda first: (first,), lambda first, n: first),
    "copy": partial(Coder, Tensor.clone, Tensor.clone),
}


def cases(n: int = 2048, block: int = BLOCK) -> list[Case]:
    return [*coders("normal", partial(normal, n), block), *(_compressed_linear(n, rows) for rows in (1, 4, 16, 128))]


def coders(of: str, weights: Callable[[], Tensor], block: int = BLOCK) -> list[Case]:
    """All coders on `weights`' numbers, at least `block` of them, in bfloat16."""

    def blocks() -> list[Tensor]:
        return [part for part in weights().split(block) if len(part) == block][:MOST_BLOCKS]

    def encoding(coder: Callable[[], Coder]) -> Call:
        encode, turn = coder().encode, itertools.cycle(blocks())
        return lambda: encode(next(turn))

    def decoding(coder: Callable[[], Coder]) -> Call:
        encode, decode = coder()
        turn = itertools.cycle([encode(part) for part in blocks()])
        return lambda: decode(next(turn))

    def contenders(direction: Callable[[Callable[[], Coder]], Call], own: Coder) -> dict[str, Prepare]:
        others: dict[str, Prepare] = {name: partial(direction, coder) for name, coder in OTHERS.items()}
        return {"ours": ours(partial(direction, lambda: own)), **others}

    nbytes = BF16.itemsize * block
    size = partial(_size, nbytes)
    return [
        case
        for name, own in OURS.items()
        for case in (
            Case(f"{name}, encode", of, nbytes, contenders(encoding, own), size=size),
            Case(
                f"{name}, decode",
                of,
                nbytes,
                contenders(decoding, own),
                dict.fromkeys(PROTOTYPES[name], 0.8),
                PROTOTYPES[name],
            ),
        )
    ]


@cache
def normal(n: int) -> Tensor:
    """n rows of n numbers, each row with a scale of its own, as in trained models."""
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(n, 1, generator=g).mul(2).sub(6).exp2()
    return (scale * torch.randn(n, n, generator=g)).to(BF16).flatten()


def _size(original: int, coded: Any) -> float:
    return _nbytes(coded) / original


def _nbytes(coded: Any) -> int:
    if isinstance(coded, Tensor):
        return coded.nbytes
    return sum(map(_nbytes, coded)) if isinstance(coded, tuple) else len(coded)


def _compressed_linear(n: int, rows: int) -> Case:
    def prepare() -> Call:
        x, weights = torch.randn(rows, n), copies(*compressed_weight(normal(n).view(n, n)))
        return lambda: compressed_linear(x, *next(weights))

    contenders: dict[str, Prepare] = {"ours": ours(prepare)}
    for name in ("bfloat16", "float32"):
        contenders[f"linear {name}"] = partial(peers.dense, n, rows, getattr(torch, name))
    return Case("compressed_linear", f"{rows} x {n} x {n}", BF16.itemsize * n * n, contenders)
