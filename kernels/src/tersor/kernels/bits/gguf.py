"""The blocks of GGUF files: Q4_0, Q4_1, Q8_0, and the K types Q2_K, Q3_K, Q4_K, whose groups share a scale of scales.

A row of bytes is a row of blocks. Scales are float16; those of the K types are small integers times one float16 of the
block of 256. Numbers lie with their lowest byte first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Decoded(NamedTuple):
    """W = codes * scale + offset, exactly what the file means.

    On a grid with zero points, as `dequant_matmul` wants them, zero_point = -offset / scale: exact for Q4_0, Q8_0 and
    Q3_K (8, 128 and 4), rounded for the others, and not to be had where scale = 0.

    Args:
        codes: (out, in), uint8.
        scale, offset: (out, groups), float32; groups of 16 (Q2_K, Q3_K) or 32 input channels.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def decode(data: Tensor, kind: str) -> Decoded:
    """Codes and grid of a tensor of this kind ("Q4_0", "Q4_K", ...): (out, bytes), uint8.

    >>> block = torch.tensor([[0x00, 0x3C] + 16 * [0x98]], dtype=torch.uint8)  # scale 1, codes 8 and 9
    >>> codes, scale, offset = decode(block, "Q4_0")
    >>> (codes * scale + offset)[0, [0, 31]]
    tensor([0., 1.])
    """
    nbytes, read = _kind(kind)
    if data.dtype != torch.uint8 or data.dim() != 2:
        raise TypeError(f"gguf: data must be torch.uint8 (out, bytes), got {data.dtype} {tuple(data.shape)}")
    if data.shape[1] % nbytes:
        raise ValueError(f"gguf: a row of {data.shape[1]} bytes is no whole number of {kind} blocks of {nbytes}")
    parts = read(data.unflatten(-1, (data.shape[1] // nbytes, nbytes)))
    return Decoded(*(part.flatten(1) for part in parts))


def encode(codes: Tensor, scale: Tensor, offset: Tensor, kind: str) -> Tensor:
    """The bytes of `Decoded` for "Q4_0", "Q4_1" and "Q8_0"; `decode` gives back the same numbers.

    Raises:
        ValueError: what the kind cannot hold: a scale that is not float16, another zero point, larger codes.
        NotImplementedError: for the K types, whose scales would have to be quantized as well.
    """
    _kind(kind)
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        raise NotImplementedError(
            f"gguf: {kind} has quantized scales, which encode does not make; use Q4_0, Q4_1 or Q8_0"
        )
    groups = (codes.shape[0], codes.shape[-1] // 32)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % 32:
        raise ValueError(f"gguf: codes must be torch.uint8 (out, 32 groups), got {codes.dtype} {tuple(codes.shape)}")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor.shape != groups:
            raise ValueError(f"gguf: {name} must be (out, in / 32) = {groups}, got {tuple(tensor.shape)}")
    if not torch.equal(scale.half().to(scale.dtype), scale):
        raise ValueError("gguf: scale is not float16; choose the codes for scale.half()")
    if kind == "Q4_1":
        if not torch.equal(offset.half().to(offset.dtype), offset):
            raise ValueError("gguf: offset is not float16; choose the codes for offset.half()")
        grid = [scale, offset]
    else:
        middle = 8 if kind == "Q4_0" else 128
        if not torch.equal(offset, -middle * scale):
            raise ValueError(f"gguf: the zero point of {kind} is {middle}, so offset must be -{middle} * scale")
        grid = [scale]
    blocks = codes.unflatten(-1, (groups[1], 32))
    if kind == "Q8_0":
        packed = blocks ^ 128
    elif codes.numel() and codes.max() > 15:
        raise ValueError(f"gguf: codes of {kind} must be 0 to 15, but the largest is {int(codes.max())}")
    else:
        packed = blocks[..., :16] | blocks[..., 16:] << 4
    return torch.cat([*(t[..., None].half().view(torch.uint8) for t in grid), packed], -1).flatten(1)


def _kind(kind: str) -> tuple[int, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    if kind not in _KINDS:
        raise ValueError(f"gguf: the layouts of {', '.join(_KINDS)} are built in, not that of {kind!r}")
    return _KINDS[kind]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at this byte of each block: (out, blocks, 1), in float32."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def _fields(values: Tensor, run: int, width: int) -> Tensor:
    """Each run of bytes holds as many runs of codes: those in the lowest `width` bits, then the next, ..."""
    runs = values.unflatten(-1, (values.shape[-1] // run, 1, run))
    shifts = torch.arange(0, 8, width, device=values.device, dtype=torch.uint8)[:, None]
    return (runs >> shifts & 2**width - 1).flatten(-3)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(blocks, 0)
    return _fields(blocks[..., 2:], 16, 4), scale, -8 * scale


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fields(blocks[..., 4:], 16, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(blocks, 0)
    return blocks[..., 2:] ^ 128, scale, -128 * scale


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grid = blocks[..., :16]
    return _fields(blocks[..., 16:80], 32, 2), _half(blocks, 80) * (grid & 15), -(_half(blocks, 82) * (grid >> 4))


def _q3_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _fields(blocks[..., 32:96], 32, 2) | _fields(blocks[..., :32], 32, 1) << 2
    # 16 scales of 6 bits: 4 in one half of 8 bytes, 2 in a quarter of the other 4
    six = _fields(blocks[..., 96:104], 8, 4) | _fields(blocks[..., 104:108], 4, 2) << 4
    scale = _half(blocks, 108) * (six.float() - 32)
    return codes, scale, -4 * scale


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # 8 scales and 8 minima of 6 bits: the first four whole; of the others 4 bits together, 2 in the tops of the first
    scales, minima, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], -1)
    minima = torch.cat([minima & 63, rest >> 4 | minima >> 6 << 4], -1)
    return _fields(blocks[..., 16:], 32, 4), _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


_KINDS = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
}
