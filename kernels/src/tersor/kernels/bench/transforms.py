"""Orthogonal transforms, and codes packed into bytes."""

import torch
from torch import Tensor

from tersor.kernels.bench.case import Case, Prepare, on, ours, reference
from tersor.kernels.bits import pack_bits, unpack_bits
from tersor.kernels.butterfly import butterfly
from tersor.kernels.hadamard import hadamard
from tersor.kernels.hadamard.matrix import hadamard_matrix


def cases(n: int = 4096, num_codes: int = 2**24) -> list[Case]:
    return [
        _hadamard(1, n, "float32"),
        _hadamard(512, n, "float32", {"dense matmul": 20.0}),
        # few rows: the dense product takes a minute for 512, where a processor has no instructions for bfloat16
        _hadamard(64, n, "bfloat16", {"dense matmul": 20.0}),
        _hadamard(256, 7 * n // 2, "float32"),
        _hadamard(n, 128, "float32"),
        *(_butterfly(*shape) for shape in ((1, n), (256, n), (n, 128))),
        *(case for width in (128, n) for bits in (1, 2, 3, 4, 8) for case in _bits(num_codes // width, width, bits)),
    ]


def _hadamard(rows: int, n: int, name: str, bars: dict[str, float] | None = None) -> Case:
    dtype = getattr(torch, name)

    def draw() -> tuple[Tensor]:
        return (torch.randn(rows, n, dtype=dtype),)

    contenders = {
        "ours": ours(on(draw, hadamard)),
        "butterfly": reference(on(draw, hadamard)),
        "dense matmul": on(
            lambda: (*draw(), hadamard_matrix(n, torch.float32, torch.device("cpu")).to(dtype)), torch.mm
        ),
    }
    return Case(f"hadamard {name}", f"{rows} x {n}", rows * n * dtype.itemsize, contenders, bars or {})


def _butterfly(rows: int, n: int) -> Case:
    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(rows, n), torch.randn(n.bit_length() - 1, n // 2)

    def dense() -> tuple[Tensor, Tensor]:
        x, angles = draw()
        return x, butterfly(torch.eye(n), angles)

    contenders = {
        "ours": ours(on(draw, butterfly)),
        "stage by stage": reference(on(draw, butterfly)),
        "hadamard": on(lambda: draw()[:1], hadamard),
        "dense matmul": on(dense, torch.mm),
    }
    return Case("butterfly", f"{rows} x {n}", 4 * (rows * n + (n.bit_length() - 1) * (n // 2)), contenders)


def _bits(rows: int, n: int, bits: int) -> list[Case]:
    def codes() -> tuple[Tensor]:
        return (torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8),)

    def packed() -> tuple[Tensor]:
        return (pack_bits(*codes(), bits),)

    pack, unpack = on(codes, lambda c: pack_bits(c, bits)), on(packed, lambda p: unpack_bits(p, bits, n))
    packing: dict[str, Prepare] = {"ours": ours(pack), "PyTorch": reference(pack), "copy": on(codes, torch.clone)}
    unpacking: dict[str, Prepare] = {"ours": ours(unpack), "PyTorch": reference(unpack), "copy": on(codes, torch.clone)}
    bars = {}
    if bits in (1, 2, 4):
        packing["neighbours in a byte"] = on(codes, lambda c: _pack_neighbours(c, bits))
        unpacking["neighbours in a byte"] = on(packed, lambda p: _unpack_neighbours(p, bits))
        # of long rows, where short ones are not the price
        bars = {"copy": 0.25, "neighbours in a byte": 5.0} if n > 128 else {}
    shape = f"{rows} x {n} codes"
    return [
        Case(f"pack_bits {bits} bits", shape, rows * n, packing, bars),
        Case(f"unpack_bits {bits} bits", shape, rows * n * bits // 8, unpacking, bars),
    ]


def _pack_neighbours(codes: Tensor, bits: int) -> Tensor:
    """Neighbouring codes in a byte, as the first thing that one would write."""
    fields = codes.unflatten(-1, (-1, 8 // bits))
    return (fields << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _unpack_neighbours(packed: Tensor, bits: int) -> Tensor:
    return (packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & 2**bits - 1).flatten(-2)
