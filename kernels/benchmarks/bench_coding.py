"""Our coders beside zstandard (and ZipNN where installed), in one run: pytest kernels/benchmarks/bench_coding.py -s

Prints ratio = coded / original bytes, and GB/s of original bytes (10^9), of weights in bfloat16: both planes, encoded from
the numbers and decoded back to them, in blocks of 2^20 numbers. One thread and its CPU time, lower quartile; the
contenders take turns, so that other work on the machine hits all of them. Compare within a run only.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tersor.kernels.compressed_linear import compressed_linear, compressed_weight
from tersor.kernels.fixed_planes import fixed_planes_decode, fixed_planes_encode
from tersor.kernels.planes import plane_merge, plane_split
from tersor.kernels.prefix6 import prefix6_decode, prefix6_encode
from tersor.kernels.rans11 import rans11_decode, rans11_encode
from tersor.kernels.tiered import tiered_decode, tiered_encode

ZOO = Path(__file__).parents[2] / "integration/src/tersor/integration/zoo"
BLOCK = 2**20
BF16 = torch.bfloat16


class Contender(NamedTuple):
    encode: Callable[[Tensor], object]
    decode: Callable[[object], object]
    nbytes: Callable[[object], int]


def in_planes(encode, decode) -> Contender:
    def both(weights: Tensor):
        first, rest = plane_split(weights)
        return encode(first), rest

    def back(coded) -> Tensor:
        symbols, rest = coded
        return plane_merge(decode(*symbols, rest.numel()), rest, BF16)

    return Contender(both, back, lambda coded: sum(t.numel() for t in coded[0]) + coded[1].numel())


def bytes_of(weights: Tensor) -> bytes:
    return weights.view(torch.uint8).numpy().tobytes()


def contenders() -> dict[str, Contender]:
    planes = in_planes(lambda e: (e,), lambda e, n: e)
    found = {
        "copy": Contender(Tensor.clone, Tensor.clone, lambda copy: copy.nbytes),
        "planes alone": planes,
        "P3": in_planes(fixed_planes_encode, fixed_planes_decode),
        "P4": in_planes(lambda e: fixed_planes_encode(e, 4), fixed_planes_decode),
        "T24": in_planes(tiered_encode, tiered_decode),
        "H6": in_planes(prefix6_encode, prefix6_decode),
        "R11": in_planes(rans11_encode, rans11_decode),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        for level in (1, 3):
            pack, unpack = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
            found[f"zstandard {level}"] = Contender(lambda w, p=pack: p.compress(bytes_of(w)), unpack.decompress, len)
            found[f"zstandard {level}, planes"] = in_planes(
                lambda e, p=pack: (torch.frombuffer(bytearray(p.compress(bytes_of(e))), dtype=torch.uint8),),
                lambda packed, n, u=unpack: torch.frombuffer(
                    bytearray(u.decompress(packed.numpy().tobytes())), dtype=torch.uint8
                ),
            )
    if importlib.util.find_spec("zipnn"):
        from zipnn import ZipNN

        zipnn = ZipNN(bytearray_dtype="bfloat16", threads=1)
        found["ZipNN"] = Contender(lambda w: zipnn.compress(bytearray(bytes_of(w))), zipnn.decompress, len)
    return found


def normal() -> Tensor:
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(2048, 1, generator=g).mul(2).sub(6).exp2()
    return (scale * torch.randn(2048, 2048, generator=g)).to(BF16).flatten()


def tiny_lm() -> Tensor:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(ZOO / "tiny_lm/model.safetensors").values()
    return torch.cat([weight.to(BF16).flatten() for weight in weights])


def minilm() -> Tensor:
    third_party = pytest.importorskip("tersor.integration.zoo.third_party.minilm_l6")
    if not importlib.util.find_spec(third_party.PACKAGED.module):
        pytest.skip(f"needs {third_party.PACKAGED.requirement}")
    return torch.cat([p.detach().to(BF16).flatten() for p in third_party.minilm()[0].parameters()])


def quartile(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def timed(call: Callable, *args):
    start = time.thread_time()
    result = call(*args)
    return result, time.thread_time() - start


@pytest.mark.parametrize("source", [normal, tiny_lm, minilm], ids=lambda source: source.__name__)
def test_coders(source):
    blocks = list(source().split(BLOCK))[:8]
    all_contenders = contenders()
    size, encode, decode = ({name: [] for name in all_contenders} for _ in range(3))
    for contender in all_contenders.values():  # compile
        contender.decode(contender.encode(blocks[0]))
    for _ in range(3):
        for block in blocks:
            for name, contender in all_contenders.items():
                coded, seconds = timed(contender.encode, block)
                encode[name].append(seconds / block.nbytes)
                back, seconds = timed(contender.decode, coded)
                decode[name].append(seconds / block.nbytes)
                size[name].append(contender.nbytes(coded) / block.nbytes)
                if isinstance(back, Tensor):
                    assert torch.equal(back.view(torch.int16), block.view(torch.int16))
    print(f"\n{source.__name__}: {sum(map(len, blocks)) / 1e6:.1f} M numbers\n{'':20} ratio   encode  decode GB/s")
    for name in all_contenders:
        ratio = sum(size[name]) / len(size[name])
        print(f"{name:20} {ratio:.4f} {1e-9 / quartile(encode[name]):7.2f} {1e-9 / quartile(decode[name]):7.2f}")


@pytest.mark.parametrize("rows", [1, 4, 16, 128])
def test_compressed_linear(rows):
    n = 2048
    # in turn from 64 MB of copies: every call finds them in memory and not in a cache, as in a model
    weights = [normal().view(n, n) for _ in range(8)]
    dense, compressed = [w.clone() for w in weights], [compressed_weight(w) for w in weights]
    x = torch.randn(rows, n)
    half = x.to(BF16)
    seconds = {"compressed": [], "bfloat16": [], "float32": []}
    floats = [w.float() for w in weights[:4]]
    for i in range(24):
        seconds["compressed"].append(timed(lambda i=i: compressed_linear(x, *compressed[i % 8]))[1])
        seconds["bfloat16"].append(timed(lambda i=i: linear(half, dense[i % 8]))[1])
        seconds["float32"].append(timed(lambda i=i: linear(x, floats[i % 4]))[1])
    ours = quartile(seconds["compressed"])
    print(
        f"\n{rows} x {n} x {n}: {ours * 1e6:.0f} us; linear takes {quartile(seconds['bfloat16']) / ours:.2f}x that in "
        f"bfloat16, {quartile(seconds['float32']) / ours:.2f}x in float32"
    )
