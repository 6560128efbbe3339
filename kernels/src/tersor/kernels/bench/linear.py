"""Linear layers with compressed weights, n x n, groups of 128; decoding one token is 1 row."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.kernels.bench import peers
from tersor.kernels.bench.case import READING, Call, Case, Prepare, copies, ours, reference
from tersor.kernels.bitplane_linear import bipolar_linear, bit_planes, bitplane_linear
from tersor.kernels.bits import pack_bits
from tersor.kernels.dequant_matmul import dequant_matmul
from tersor.kernels.int8_linear import int8_linear, w8a8_linear
from tersor.kernels.lookup_linear import lookup_linear
from tersor.kernels.quantize_per_token import quantize_per_token
from tersor.kernels.vector_codebook_linear import vector_codebook_linear
from tersor.kernels.w4a8_linear import w4a8_linear
from tersor.kernels.wna8_linear import wna8_linear

GROUP_SIZE = 128
ROWS = (1, 4, 16)

# reached by prototypes on two cores with AVX-512; `linear` in bfloat16 is that of torch 2.15
BARS: dict[tuple[str, int], dict[str, float]] = {
    ("lookup_linear 4 bits", 1): {
        READING: 0.8,
        "ATen int4": 1.25,
        "optimum-quanto qint4": 1.25,
        "linear bfloat16": 2.4,
    },
    ("lookup_linear 4 bits", 4): {"ATen int4": 1.5},
    ("lookup_linear 4 bits", 16): {"ATen int4": 0.9},
    ("lookup_linear nf4", 1): {READING: 0.8, "bitsandbytes nf4": 0.95},
    ("lookup_linear nf4", 4): {"bitsandbytes nf4": 1.0},
    ("lookup_linear 2 bits", 1): {"optimum-quanto qint2": 100, "linear bfloat16": 3.5},
    ("wna8_linear 4 bits", 1): {READING: 0.8, "ATen int4": 1.25, "linear bfloat16": 2.4},
    ("wna8_linear 4 bits", 4): {"ATen int4": 1.5},
    ("wna8_linear 4 bits", 16): {"ATen int4": 0.9},
    ("wna8_linear 2 bits", 1): {"linear bfloat16": 3.5},
    ("wna8_linear 8 bits", 1): {"ATen int8": 1.7},
    ("int8_linear, channels", 1): {"ATen int8": 1.7, "optimum-quanto qint8": 1.7, "bitsandbytes int8": 1.7},
}


def cases(n: int = 4096) -> list[Case]:
    return [
        *(case for rows in ROWS for case in _lookups(n, rows)),
        *(_dequant_matmul(n, rows, bits) for rows in (*ROWS, 128) for bits in (2, 3, 4, 8)),
        *(case for rows in ROWS for case in _int8(n, rows)),
        *(_rounded_inputs(n, rows, bits) for rows in ROWS for bits in (2, 3, 4, 8)),
        *(case for rows in ROWS for bits in ((1, 1), (2, 8), (4, 4)) for case in _bit_planes(n, rows, *bits)),
        *(_vector_codebook(n, rows, *code) for rows in ROWS for code in ((1, 8), (2, 8), (1, 12))),
    ]


def _case(op: str, n: int, rows: int, nbytes: int, contenders: dict[str, Prepare]) -> Case:
    dense = {f"linear {name}": partial(peers.dense, n, rows, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return Case(op, f"{rows} x {n} x {n}", nbytes, contenders | dense, BARS.get((op, rows), {}))


def _lookups(n: int, rows: int) -> list[Case]:
    """Integers, NF4, and integers with zero points; x in bfloat16, as for the peers, unless said."""
    found = []
    for bits in (1, 2, 3, 4):
        others: dict[str, Prepare] = {}
        if bits == 4:
            others["ATen int4"] = partial(peers.aten_int4, n, rows, GROUP_SIZE)
        if bits in (2, 4):
            others[f"optimum-quanto qint{bits}"] = partial(peers.quanto, n, rows, f"qint{bits}")
        found.append(_lookup(f"{bits} bits", n, rows, torch.arange(2.0**bits), 1, others))
    found.append(_lookup("4 bits, float32", n, rows, torch.arange(16.0), 1, {}, torch.float32))
    nf4: dict[str, Prepare] = {"bitsandbytes nf4": partial(peers.bitsandbytes_nf4, n, rows)}
    return [
        *found,
        _lookup("nf4", n, rows, torch.randn(16), 1, nf4),
        _lookup("4 bits, zero points", n, rows, torch.arange(16.0), 2, {}),
    ]


def _lookup(
    codes: str,
    n: int,
    rows: int,
    codebook: Tensor,
    grids: int,
    others: dict[str, Prepare],
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    bits = len(codebook).bit_length() - 1

    def prepare() -> Call:
        x = torch.randn(rows, n, dtype=dtype)
        weights = copies(_some_packed(n, bits), *(_some_grid(n) for _ in range(grids)))

        def run() -> Tensor:
            packed, scale, *zero_point = next(weights)
            return lookup_linear(x, packed, codebook, scale, bits, GROUP_SIZE, *zero_point)

        return run

    contenders = {"ours": ours(prepare), "dequantise": reference(prepare), **others}
    return _case(f"lookup_linear {codes}", n, rows, n * n * bits // 8 + grids * _grid_bytes(n), contenders)


def _dequant_matmul(n: int, rows: int, bits: int) -> Case:
    def prepare() -> Call:
        x, weights = torch.randn(rows, n), copies(_some_packed(n, bits), _some_grid(n), _some_grid(n))

        def run() -> Tensor:
            packed, scale, zero_point = next(weights)
            return dequant_matmul(x, packed, scale, zero_point, bits, GROUP_SIZE)

        return run

    contenders = {"ours": ours(prepare), "dequantise": reference(prepare)}
    return _case(f"dequant_matmul {bits} bits", n, rows, n * n * bits // 8 + 2 * _grid_bytes(n), contenders)


def _int8(n: int, rows: int) -> list[Case]:
    """A scale per channel; a scale and a zero point per group; rows of int8, too; and weights of 4 bits with those."""

    def channels() -> Call:
        x, weights, scale = torch.randn(rows, n), copies(_some_int8(n, n)), torch.rand(n, 1)
        return lambda: int8_linear(x, next(weights)[0], scale)

    def groups() -> Call:
        x, weights = torch.randn(rows, n), copies(_some_int8(n, n), _some_grid(n), _some_grid(n))
        return lambda: int8_linear(x, *next(weights))

    def w8a8() -> Call:
        x, x_scale, weights, scale = _some_int8(rows, n), torch.rand(rows), copies(_some_int8(n, n)), torch.rand(n)
        return lambda: w8a8_linear(x, x_scale, next(weights)[0], scale)

    def w4a8() -> Call:
        x, x_scale, weights, scale = _some_int8(rows, n), torch.rand(rows), copies(_some_packed(n, 4)), torch.rand(n)
        return lambda: w4a8_linear(x, x_scale, next(weights)[0], scale)

    def w4a8_groups() -> Call:
        x, x_scale, scale = _some_int8(rows, n), torch.rand(rows), torch.rand(n)
        grids = (torch.randint(low, 8, (n, n // GROUP_SIZE), dtype=torch.int8) for low in (1, -8))
        weights = copies(_some_packed(n, 4), *grids)

        def run() -> Tensor:
            packed, *grid = next(weights)
            return w4a8_linear(x, x_scale, packed, scale, *grid)

        return run

    others: dict[str, Prepare] = {
        "ATen int8": partial(peers.aten_int8, n, rows),
        "optimum-quanto qint8": partial(peers.quanto, n, rows, "qint8"),
        "bitsandbytes int8": partial(peers.bitsandbytes_int8, n, rows),
    }
    integers: dict[str, Prepare] = {"ATen int_mm": partial(peers.aten_int_mm, n, rows)}
    return [
        _case("int8_linear, channels", n, rows, n * n, {"ours": ours(channels), **others}),
        _case("int8_linear, groups", n, rows, n * n + 2 * _grid_bytes(n), {"ours": ours(groups), **others}),
        _case("w8a8_linear", n, rows, n * n, {"ours": ours(w8a8), **others, **integers}),
        _case("w4a8_linear, channels", n, rows, n * n // 2, {"ours": ours(w4a8)}),
        _case("w4a8_linear, groups", n, rows, n * n // 2 + 2 * n * n // GROUP_SIZE, {"ours": ours(w4a8_groups)}),
    ]


def _rounded_inputs(n: int, rows: int, bits: int) -> Case:
    """Packed codes times x, which is rounded to int8 in each call."""

    def operands() -> tuple[Tensor, Iterator[Any]]:
        return torch.randn(rows, n), copies(_some_packed(n, bits), _some_grid(n), _some_grid(n))

    def prepare() -> Call:
        x, weights = operands()

        def run() -> Tensor:
            packed, scale, zero_point = next(weights)
            return wna8_linear(*quantize_per_token(x), packed, scale, zero_point, bits, GROUP_SIZE)

        return run

    def exact() -> Call:
        x, weights = operands()

        def run() -> Tensor:
            packed, scale, zero_point = next(weights)
            return dequant_matmul(x, packed, scale, zero_point, bits, GROUP_SIZE)

        return run

    contenders: dict[str, Prepare] = {"ours": ours(prepare), "dequant_matmul": exact}
    if bits == 4:
        contenders["ATen int4"] = partial(peers.aten_int4, n, rows, GROUP_SIZE)
    if bits == 8:
        contenders["ATen int8"] = partial(peers.aten_int8, n, rows)
    return _case(f"wna8_linear {bits} bits", n, rows, n * n * bits // 8 + 2 * _grid_bytes(n), contenders)


def _bit_planes(n: int, rows: int, bits: int, x_bits: int) -> list[Case]:
    """With what cuts x into planes, which has to be done for each call."""

    def operands() -> tuple[Tensor, Tensor, Iterator[Any], Tensor]:
        x, codes = (torch.randint(0, 2**b, (m, n), dtype=torch.uint8) for b, m in ((x_bits, rows), (bits, n)))
        return x, torch.rand(rows), copies(bit_planes(codes, bits)), torch.rand(n, 1)

    def asymmetric() -> Call:
        x, x_scale, weights, scale = operands()
        x_zero, zero = torch.zeros(rows, dtype=torch.uint8), torch.ones(n, 1, dtype=torch.uint8)
        return lambda: bitplane_linear(bit_planes(x, x_bits), x_scale, x_zero, next(weights)[0], scale, zero, n)

    def bipolar() -> Call:
        x, x_scale, weights, scale = operands()
        return lambda: bipolar_linear(bit_planes(x, x_bits), x_scale, next(weights)[0], scale, n)

    def w8a8() -> Call:
        x, x_scale, weights, scale = _some_int8(rows, n), torch.rand(rows), copies(_some_int8(n, n)), torch.rand(n)
        return lambda: w8a8_linear(x, x_scale, next(weights)[0], scale)

    return [
        _case(f"{op} {bits} x {x_bits} bits", n, rows, n * n * bits // 8, {"ours": ours(prepare), "w8a8_linear": w8a8})
        for op, prepare in (("bitplane_linear", asymmetric), ("bipolar_linear", bipolar))
    ]


def _vector_codebook(n: int, rows: int, num_codebooks: int, bits: int) -> Case:
    dtype = torch.uint8 if bits == 8 else torch.uint16

    def prepare() -> Call:
        codes = torch.randint(0, 2**bits, (n, n // 8, num_codebooks)).to(dtype)
        x, codebooks, scale = torch.randn(rows, n), torch.randn(num_codebooks, 2**bits, 8), torch.rand(n)
        weights = copies(codes)
        return lambda: vector_codebook_linear(x, next(weights)[0], codebooks, scale)

    nbytes = n * n // 8 * num_codebooks * dtype.itemsize
    return _case(f"vector_codebook_linear {num_codebooks} x {bits} bits", n, rows, nbytes, {"ours": ours(prepare)})


def _some_packed(n: int, bits: int) -> Tensor:
    return pack_bits(torch.randint(0, 2**bits, (n, n), dtype=torch.uint8), bits)


def _some_int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _some_grid(n: int) -> Tensor:
    return torch.rand(n, n // GROUP_SIZE) + 0.1


def _grid_bytes(n: int) -> int:
    return 4 * n * n // GROUP_SIZE
