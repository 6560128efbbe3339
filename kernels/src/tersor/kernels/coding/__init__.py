"""What the entropy coders share.

A coder turns bytes, its *symbols*, into three byte tensors: a `table` (what the decoder must know first), a `stream`, and
a `side` stream for what the code does not cover. They are the three sections of a plane in the packed file. No symbols
are coded as three empty tensors; else the symbols are padded to a multiple of 128. Numbers of several bytes are
little-endian. Every body of an encoder gives the same bytes, and every body of a decoder refuses, with a `ValueError`
that names the op and the reason, what no encoder can have written.
"""

import itertools

import torch
from torch import Tensor


def check_symbols(of: str, symbols: Tensor) -> None:
    if symbols.dtype != torch.uint8:
        raise TypeError(
            f"{of}: symbols must be uint8, got {symbols.dtype}; plane_split or .view(torch.uint8) makes them"
        )


def check_coded(of: str, table: Tensor, stream: Tensor, side: Tensor, n: int) -> None:
    for name, tensor in (("table", table), ("stream", stream), ("side", side)):
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{of}: {name} must be uint8, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{of}: {name} must have one dimension, got the shape {tuple(tensor.shape)}")
        if tensor.device != table.device:
            raise ValueError(f"{of}: {name} is on {tensor.device}, but table is on {table.device}")
    if n < 0:
        raise ValueError(f"{of}: n must not be negative, got {n}")


def unknown_size(like: Tensor) -> Tensor:
    """Bytes whose number only the values will tell, for `torch.compile`."""
    return like.new_empty(torch.library.get_ctx().new_dynamic_size())


def nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like.new_empty(0), like.new_empty(0), like.new_empty(0)


def require(of: str, condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(f"{of}: the coded data is damaged: {reason}")


def require_size(of: str, name: str, tensor: Tensor, size: int) -> None:
    require(of, tensor.numel() == size, f"{name} has {tensor.numel()} bytes instead of {size}")


def padded(n: int, multiple: int = 128) -> int:
    return -(-n // multiple) * multiple


def histogram(symbols: Tensor) -> list[int]:
    return torch.bincount(symbols.flatten(), minlength=256).tolist()


def window(counts: list[int], length: int, last: int) -> int:
    """Start, at most `last`, of the `length` neighbours that occur most often together; the first if several do."""
    until = [0, *itertools.accumulate(counts)]
    sums = [until[start + length] - until[start] for start in range(last + 1)]
    return sums.index(max(sums))


def bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Per row of `codes` (groups, 64), `bits` masks of 64 bits: bit i of mask j is bit j of code i. As bytes."""
    masks = torch.stack([codes >> j & 1 for j in range(bits)], 1).unflatten(-1, (8, 8))
    return (masks << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8).flatten()


def from_bit_planes(stream: Tensor, bits: int) -> Tensor:
    """Codes (groups, 64) of the masks; the inverse of `bit_planes`."""
    masks = (stream.reshape(-1, bits, 8, 1) >> torch.arange(8, dtype=torch.uint8, device=stream.device) & 1).flatten(-2)
    return torch.stack([masks[:, j] << j for j in range(bits)]).sum(0, dtype=torch.uint8)
