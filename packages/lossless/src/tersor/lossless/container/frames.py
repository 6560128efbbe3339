"""Frames: one tensor (or one other file) cut into blocks that are coded, checked and decoded independently."""

import struct
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from ..coder import DECODERS, Stored, Zstd
from ..coder.stored import Coder
from ..errors import CorruptFile
from ..layout.planes import Form

ALIGNMENT = 64  # every section starts at a multiple of it, so that SIMD decoders may read whole registers
BLOCK_LOG2 = range(10, 25)

_MAGIC, _VERSION = b"TLF1", 1
_HEAD = struct.Struct("<4s4BQ2I4QQ")  # see README.md, "Frame"
_ENTRY = struct.Struct("<QII")
_PLANE = struct.Struct("<B3xI")


@dataclass(frozen=True)
class Frames:
    """A safetensors file with one frame per tensor and per other file.

    Args:
        block_log2: a block has 2^block_log2 elements. Blocks are what threads share and what is held in memory.
        files_coder: for what is no tensor (configuration, tokenizer, headers).
        files_block_log2: the same, in bytes, for those.
    """

    block_log2: int = 18
    files_coder: Coder = field(default_factory=lambda: Zstd(9))
    files_block_log2: int = 22

    def __post_init__(self) -> None:
        for name in ("block_log2", "files_block_log2"):
            if getattr(self, name) not in BLOCK_LOG2:
                bounds = f"{BLOCK_LOG2.start} to {BLOCK_LOG2.stop - 1}"
                raise ValueError(f"{name} must be {bounds}, got {getattr(self, name)}")


class Block(NamedTuple):
    nbytes: int  # stored, a multiple of ALIGNMENT
    xxh3: int  # of the stored bytes


@dataclass(frozen=True)
class Frame:
    """What head and index of a frame say. `nbytes` is the size of the frame, `raw_nbytes` that of what it packs."""

    form: Form
    block_log2: int
    n_elements: int
    raw_xxh3: int
    blocks: tuple[Block, ...]

    @property
    def raw_nbytes(self) -> int:
        return self.n_elements * self.form.width

    @property
    def head_nbytes(self) -> int:
        return head_nbytes(self.form, self.block_log2, self.raw_nbytes)

    @property
    def nbytes(self) -> int:
        return self.head_nbytes + sum(block.nbytes for block in self.blocks)

    def block_raw_nbytes(self, index: int) -> int:
        return min(1 << self.block_log2, self.n_elements - (index << self.block_log2)) * self.form.width

    def to_bytes(self) -> bytes:
        """Head and index, padded."""
        index = b"".join(_ENTRY.pack(block.xxh3, block.nbytes, 0) for block in self.blocks)
        head = _HEAD.pack(
            _MAGIC, _VERSION, self.form.kind, self.form.width, self.block_log2, self.n_elements, len(self.blocks), 0, 0,
            self.nbytes, self.raw_xxh3, 0, 0,
        )[:-8]  # fmt: skip
        index = index.ljust(self.head_nbytes - _HEAD.size, b"\0")
        return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + index)) + index


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def n_blocks(form: Form, block_log2: int, raw_nbytes: int) -> int:
    return -(-(raw_nbytes // form.width) // (1 << block_log2))


def head_nbytes(form: Form, block_log2: int, raw_nbytes: int) -> int:
    """Bytes of head and index: known before the blocks are coded."""
    return padded(_HEAD.size + n_blocks(form, block_log2, raw_nbytes) * _ENTRY.size)


def frame_bound(form: Form, block_log2: int, raw_nbytes: int) -> int:
    """The most bytes that a frame of `raw_nbytes` can take: every plane stored, every section padded."""
    blocks = n_blocks(form, block_log2, raw_nbytes)
    sections = blocks * (padded(form.width * _PLANE.size) + form.width * (ALIGNMENT - 1))
    return head_nbytes(form, block_log2, raw_nbytes) + raw_nbytes + sections


def read_exactly(file: BinaryIO, offset: int, nbytes: int, where: str) -> bytes:
    """`nbytes` of `file` at `offset`; the one place where a packed file is read."""
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise CorruptFile(f"{where}: file ends at byte {offset + len(data)}, expected {nbytes} bytes from {offset}")
    return data


def read_frame(file: BinaryIO, begin: int, end: int, where: str) -> Frame:
    """Head and index of the frame at `begin` to `end`, checked. `where` names file and tensor in errors."""

    def check(holds: bool, reason: str) -> None:
        if not holds:
            raise CorruptFile(f"{where}: {reason}")

    check(end - begin >= _HEAD.size, f"frame of {end - begin} bytes is shorter than its head")
    head = read_exactly(file, begin, _HEAD.size, where)
    magic, version, kind, width, block_log2, n_elements, blocks, _, reference, nbytes, raw_xxh3, _, xxh3 = _HEAD.unpack(
        head
    )
    form = Form(kind, width)
    check(magic == _MAGIC, f"frame begins with {magic!r}, expected {_MAGIC!r}")
    check(version == _VERSION and reference == 0, f"frame of unknown version {version} (or with a reference)")
    check(form.valid, f"unknown layout {kind} with {width} planes")
    check(block_log2 in BLOCK_LOG2, f"blocks of 2^{block_log2} elements")
    check(blocks == n_blocks(form, block_log2, n_elements * width), f"{blocks} blocks for {n_elements} elements")
    index_nbytes = head_nbytes(form, block_log2, n_elements * width) - _HEAD.size
    check(nbytes == end - begin, f"frame says {nbytes} bytes, the header of the file {end - begin}")
    check(_HEAD.size + index_nbytes <= nbytes, f"index of {blocks} blocks does not fit into {nbytes} bytes")
    index = read_exactly(file, begin + _HEAD.size, index_nbytes, where)
    check(xxhash.xxh3_64_intdigest(head[:-8] + index) == xxh3, "checksum of the frame's head does not match")
    frame = Frame(
        form,
        block_log2,
        n_elements,
        raw_xxh3,
        tuple(Block(size, block_xxh3) for block_xxh3, size, _ in _ENTRY.iter_unpack(index[: blocks * _ENTRY.size])),
    )
    check(all(block.nbytes and block.nbytes % ALIGNMENT == 0 for block in frame.blocks), "blocks are not aligned")
    check(frame.nbytes == nbytes, f"blocks fill {frame.nbytes} of {nbytes} bytes")
    return frame


def encode_block(raw: np.ndarray, form: Form, coder: Coder) -> tuple[bytes, Block]:
    """A block, uint8 (n * width,), as a record per plane and the planes, each by `coder` or stored if that is less."""
    records, streams = [], []
    for plane in form.split(raw):
        stream, used = coder.encode(plane.data), coder.id
        if len(stream) >= plane.nbytes:
            stream, used = plane.data, Stored.id
        records.append(_PLANE.pack(used, len(stream)))
        streams += [stream, bytes(-len(stream) % ALIGNMENT)]
    heads = b"".join(records)
    stored = b"".join([heads, bytes(-len(heads) % ALIGNMENT), *streams])
    return stored, Block(len(stored), xxhash.xxh3_64_intdigest(stored))


def decode_block(stored: bytes, block: Block, form: Form, out: np.ndarray, where: str) -> None:
    """Undo `encode_block` into `out`, uint8 (n * width,)."""
    if xxhash.xxh3_64_intdigest(stored) != block.xxh3:
        raise CorruptFile(f"{where}: checksum of the stored bytes does not match")
    records = read_records(stored, form, where)
    view, at, planes = memoryview(stored), padded(form.width * _PLANE.size), []
    if at + sum(padded(nbytes) for _, nbytes in records) != len(stored):
        raise CorruptFile(f"{where}: planes do not fill the block")
    for coder, nbytes in records:
        try:
            plane = DECODERS[coder](view[at : at + nbytes], out.nbytes // form.width)
        except ValueError as error:
            raise CorruptFile(f"{where}: {error}") from error
        planes.append(np.frombuffer(plane, np.uint8))
        at += padded(nbytes)
    form.join(planes, out)


def read_records(stored: bytes, form: Form, where: str) -> list[tuple[int, int]]:
    """(coder id, bytes) of each plane, from the start of a block."""
    if len(stored) < form.width * _PLANE.size:
        raise CorruptFile(f"{where}: block of {len(stored)} bytes has no room for its records")
    records = [_PLANE.unpack_from(stored, i * _PLANE.size) for i in range(form.width)]
    for coder, _ in records:
        if coder not in DECODERS:
            raise CorruptFile(f"{where}: unknown coder {coder}")
    return records


RECORDS_NBYTES = 8 * _PLANE.size  # the records of the widest form
