"""The blocks of GGUF files: Q4_0, Q4_1, Q8_0, and the K types Q2_K, Q3_K, Q4_K, whose groups share a scale of scales.

A row of bytes is a row of blocks. Scales are float16; those of the K types are small integers times one float16 of the
block of 256. Numbers lie with their lowest byte first.
"""

from collections.abc import Callable
from functools import partial
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
        NotImplementedError: for the K types, whose scales are integers: see `encode_k`.
    """
    _kind(kind)
    if kind in _K_KINDS:
        raise NotImplementedError(f"gguf: the scales of {kind} are integers; encode_k takes them")
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


class KBlocks(NamedTuple):
    """What the K types store: W = codes * scale * block_scale - minimum * block_minimum; of Q3_K (codes - 4) * scale * ...

    Args:
        codes: (out, in), uint8: 2 bits (Q2_K), 3 (Q3_K) or 4 (Q4_K).
        scale: (out, groups), int8, groups of 16 (Q2_K, Q3_K) or 32: 0 ... 15 (Q2_K), -32 ... 31 (Q3_K), 0 ... 63 (Q4_K).
        minimum: (out, groups), int8: 0 ... 15 (Q2_K), 0 ... 63 (Q4_K); zeros for Q3_K, which has none.
        block_scale, block_minimum: (out, in / 256), float16.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    block_scale: Tensor
    block_minimum: Tensor


def decode_k(data: Tensor, kind: str) -> KBlocks:
    """What a tensor of kind "Q2_K", "Q3_K" or "Q4_K" stores: (out, bytes), uint8."""
    form = _k_kind(kind)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % form.nbytes:
        raise ValueError(
            f"gguf: data must be torch.uint8 (out, whole {kind} blocks of {form.nbytes} bytes), got {data.dtype} "
            f"{tuple(data.shape)}"
        )
    parts = form.read(data.unflatten(-1, (data.shape[1] // form.nbytes, form.nbytes)))
    return KBlocks(*(part.flatten(1) for part in parts))


def encode_k(stored: KBlocks, kind: str) -> Tensor:
    """The bytes (out, bytes), uint8, of a tensor of kind "Q2_K", "Q3_K" or "Q4_K"; `decode_k` gives `stored` back.

    Raises:
        ValueError: a part has another shape or dtype, or numbers that the kind cannot hold.
    """
    form, codes = _k_kind(kind), stored.codes
    if codes.dim() != 2 or codes.shape[1] % 256:
        raise ValueError(f"gguf: codes must be (out, 256 blocks), got {tuple(codes.shape)}")
    out, blocks = codes.shape[0], codes.shape[1] // 256
    groups, small = (out, codes.shape[1] // form.group_size), torch.int8
    forms = {
        "codes": (codes.shape, torch.uint8, (0, 2**form.bits - 1)),
        "scale": (groups, small, form.scales),
        "minimum": (groups, small, form.minima),
        "block_scale": ((out, blocks), torch.float16, None),
        "block_minimum": ((out, blocks), torch.float16, None),
    }
    for name, (shape, dtype, limits) in forms.items():
        part = getattr(stored, name)
        if part.shape != shape or part.dtype != dtype:
            raise ValueError(
                f"gguf: {name} of {kind} must be {dtype} {tuple(shape)}, got {part.dtype} {tuple(part.shape)}"
            )
        if limits and part.numel() and not limits[0] <= int(part.min()) <= int(part.max()) <= limits[1]:
            raise ValueError(f"gguf: {name} of {kind} must be {limits[0]} to {limits[1]}")
    return torch.cat(form.write(*(part.unflatten(-1, (blocks, -1)) for part in stored)), -1).flatten(1)


def _k_kind(kind: str) -> "_KForm":
    if kind not in _K_KINDS:
        raise ValueError(f"gguf: the K types built in are {', '.join(_K_KINDS)}, not {kind!r}")
    return _K_KINDS[kind]


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
    return (runs >> _shifts(values, width) & 2**width - 1).flatten(-3)


def _joined(codes: Tensor, run: int, width: int) -> Tensor:
    """The bytes whose `_fields` are `codes`."""
    runs = codes.unflatten(-1, (-1, 8 // width, run))
    return (runs << _shifts(codes, width)).sum(-2, dtype=torch.uint8).flatten(-2)


def _shifts(like: Tensor, width: int) -> Tensor:
    return torch.arange(0, 8, width, device=like.device, dtype=torch.uint8)[:, None]


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(blocks, 0)
    return _fields(blocks[..., 2:], 16, 4), scale, -8 * scale


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fields(blocks[..., 4:], 16, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(blocks, 0)
    return blocks[..., 2:] ^ 128, scale, -128 * scale


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _float16(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _read_q2_k(blocks: Tensor) -> tuple[Tensor, ...]:
    grid = blocks[..., :16]
    scale, minimum = (grid & 15).to(torch.int8), (grid >> 4).to(torch.int8)
    return _fields(blocks[..., 16:80], 32, 2), scale, minimum, _float16(blocks, 80), _float16(blocks, 82)


def _write_q2_k(codes: Tensor, scale: Tensor, minimum: Tensor, *halves: Tensor) -> list[Tensor]:
    return [_bytes(scale) | _bytes(minimum) << 4, _joined(codes, 32, 2), *map(_bytes, halves)]


def _read_q3_k(blocks: Tensor) -> tuple[Tensor, ...]:
    codes = _fields(blocks[..., 32:96], 32, 2) | _fields(blocks[..., :32], 32, 1) << 2
    # 16 scales of 6 bits: 4 in one half of 8 bytes, 2 in a quarter of the other 4
    six = _fields(blocks[..., 96:104], 8, 4) | _fields(blocks[..., 104:108], 4, 2) << 4
    block_scale = _float16(blocks, 108)
    return (
        codes,
        six.to(torch.int8) - 32,
        torch.zeros_like(six, dtype=torch.int8),
        block_scale,
        torch.zeros_like(block_scale),
    )


def _write_q3_k(codes: Tensor, scale: Tensor, minimum: Tensor, block_scale: Tensor, none: Tensor) -> list[Tensor]:
    six = _bytes(scale + 32)
    return [
        _joined(codes >> 2, 32, 1),
        _joined(codes & 3, 32, 2),
        _joined(six & 15, 8, 4),
        _joined(six >> 4, 4, 2),
        _bytes(block_scale),
    ]


def _read_q4_k(blocks: Tensor) -> tuple[Tensor, ...]:
    # 8 scales and 8 minima of 6 bits: the first four whole; of the others 4 bits together, 2 in the tops of the first
    scales, minima, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], -1)
    minima = torch.cat([minima & 63, rest >> 4 | minima >> 6 << 4], -1)
    codes = _fields(blocks[..., 16:], 32, 4)
    return codes, scales.to(torch.int8), minima.to(torch.int8), _float16(blocks, 0), _float16(blocks, 2)


def _write_q4_k(codes: Tensor, scale: Tensor, minimum: Tensor, *halves: Tensor) -> list[Tensor]:
    (first_scales, scales), (first_minima, minima) = (_bytes(part).split(4, -1) for part in (scale, minimum))
    tops = [first_scales | scales >> 4 << 6, first_minima | minima >> 4 << 6]
    return [*map(_bytes, halves), *tops, scales & 15 | minima << 4, _joined(codes, 32, 4)]


class _KForm(NamedTuple):
    nbytes: int
    bits: int
    group_size: int
    scales: tuple[int, int]  # the least and the largest
    minima: tuple[int, int]
    middle: int  # the code of zero where there are no minima
    read: Callable[[Tensor], tuple[Tensor, ...]]
    write: Callable[..., list[Tensor]]


_K_KINDS = {
    "Q2_K": _KForm(84, 2, 16, (0, 15), (0, 15), 0, _read_q2_k, _write_q2_k),
    "Q3_K": _KForm(110, 3, 16, (-32, 31), (0, 0), 4, _read_q3_k, _write_q3_k),
    "Q4_K": _KForm(144, 4, 32, (0, 63), (0, 63), 0, _read_q4_k, _write_q4_k),
}


def _affine(form: _KForm, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, minimum, block_scale, block_minimum = form.read(blocks)
    scale = block_scale.float() * scale
    return codes, scale, -form.middle * scale if form.middle else -(block_minimum.float() * minimum)


_KINDS = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    **{kind: (form.nbytes, partial(_affine, form)) for kind, form in _K_KINDS.items()},
}
