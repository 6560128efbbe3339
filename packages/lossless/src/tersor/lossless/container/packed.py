"""Reads a packed file: only the bytes of what is asked for, each checked before it is believed."""

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import xxhash

from ..errors import CorruptFile, NotPacked
from ..layout.planes import Form
from .frames import RECORDS_NBYTES, Block, Frame, decode_block, read_exactly, read_frame, read_records
from .manifest import MANIFEST, METADATA, FileEntry, Manifest, Trailer
from .safetensors_header import MAX_HEADER, TensorEntry, header_nbytes, parse_header, parse_json
from .workers import in_order

if TYPE_CHECKING:
    from torch import Tensor

# dtypes of safetensors that torch has under a name of its own; F4 and F6, packed below a byte, are read with get_bytes
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


class TensorInfo(NamedTuple):
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    nbytes: int
    file: str  # the file that it comes from


@dataclass(frozen=True)
class Share:
    """Bytes of one kind before and after."""

    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Stats:
    """Bytes before and after, counted from the packed file.

    `shares` is keyed by dtype and plane ("BF16 exponent", "BF16 sign+mantissa", "I64 bytes"), "files" (what is no
    tensor) and "container" (headers, index, checksums, padding: nothing before). Each column sums to the total.
    """

    bytes_in: int
    bytes_out: int
    shares: dict[str, Share]

    @property
    def ratio(self) -> float:
        """bytes_out / bytes_in: smaller is better."""
        return self.bytes_out / max(self.bytes_in, 1)


class Packed:
    """A packed file, open for reading. It holds no file handle; any number of threads may read at once.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> from tersor.lossless import open_packed, pack
    >>> here = Path(tempfile.mkdtemp())
    >>> save_file({"norm": torch.ones(4), "table": torch.zeros(1000, 4)}, here / "model.safetensors")
    >>> packed = pack(here / "model.safetensors", here / "model.tersor")
    >>> model = open_packed(here / "model.tersor")
    >>> sorted(model.keys())
    ['norm', 'table']
    >>> model.get_tensor("norm")
    tensor([1., 1., 1., 1.])
    >>> model.info("table")
    TensorInfo(dtype='F32', shape=(1000, 4), nbytes=16000, file='model.safetensors')

    Raises:
        NotPacked: `path` was not written by `pack`.
        CorruptFile: it was, and is damaged. Header, manifest and each block read are checked; `verify` checks all.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = str(self.path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, trailer = _ends(file, size, where)
            entries = {entry.name: entry for entry in parse_header(header, size, where)}
            self._ranges = {n: (len(header) + e.begin, len(header) + e.end) for n, e in entries.items()}
            begin, end = self._ranges.pop(MANIFEST, (0, 0))
            if end - begin != trailer.manifest_nbytes + Trailer.nbytes or end != size:
                raise CorruptFile(f"{where}: the manifest is not where the trailer says")
            data = read_exactly(file, begin, trailer.manifest_nbytes, f"{where}: manifest")
        if xxhash.xxh3_64_intdigest(data) != trailer.manifest_xxh3:
            raise CorruptFile(f"{where}: checksum of the manifest does not match")
        self.manifest = Manifest.from_bytes(data, f"{where}: manifest")
        self._tensors: dict[str, TensorInfo] = {}
        self._keys: dict[FileEntry, list[str]] = {}
        self._raw_nbytes = {entry.key: entry.nbytes for entry in self.manifest.files if not entry.tensors}
        for file_entry in self.manifest.files:
            self._keys[file_entry] = self._read_keys(file_entry)
        listed = [key for keys in self._keys.values() for key in keys]
        if sorted(listed) != sorted(self._ranges):
            raise CorruptFile(f"{where}: the frames are not those of the files in the manifest")

    def _read_keys(self, entry: FileEntry) -> list[str]:
        """The frames that make up a file, in order; notes its tensors."""
        if entry.key not in self._ranges:
            raise CorruptFile(f"{self.path}: no frame {entry.key!r} for {entry.path}")
        if not entry.tensors:
            return [entry.key]
        where = f"{self.path}: header of {entry.path}"
        header = b"".join(self.read_blocks([entry.key], threads=1))
        if header_nbytes(header[:8], entry.nbytes, where) != len(header):
            raise CorruptFile(f"{where}: {len(header)} bytes, which is not the length it says")
        keys = [entry.key]
        for tensor in parse_header(header, entry.nbytes, where):
            keys.append(self.manifest.key(entry, tensor.name))
            self._tensors[keys[-1]] = info = _info(tensor, entry)
            self._raw_nbytes[keys[-1]] = info.nbytes
        return keys

    def keys(self) -> list[str]:
        """The names of the tensors; `path:name` where one name occurs in several files."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            close = get_close_matches(name, self._tensors, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"{self.path} has no tensor {name!r}{hint}")
        return self._tensors[name]

    def get_bytes(self, name: str, threads: int | None = None) -> np.ndarray:
        """The bytes of a tensor as safetensors stores them, uint8 (nbytes,), writable."""
        out, at = np.empty(self.info(name).nbytes, np.uint8), 0
        for block in self.read_blocks([name], threads):
            out.data[at : at + block.nbytes] = block
            at += block.nbytes
        return out

    def get_tensor(self, name: str, threads: int | None = None) -> "Tensor":
        """A tensor, on the CPU; no other tensor is read."""
        import torch  # here: listing and unpacking a file should not wait for it

        info = self.info(name)
        dtype = getattr(torch, _TORCH.get(info.dtype, ""), None)
        if dtype is None:
            raise NotImplementedError(f"{name}: torch has no tensor of dtype {info.dtype}; use get_bytes({name!r})")
        if not info.nbytes:  # torch cannot view an empty array as another dtype
            return torch.empty(info.shape, dtype=dtype)
        return torch.from_numpy(self.get_bytes(name, threads)).view(dtype).reshape(info.shape)

    def get_file(self, path: str, threads: int | None = None) -> bytes:
        """The bytes of a packed file, by its path in the packed directory."""
        return b"".join(self.read_blocks(self._keys[self._file(path)], threads))

    def verify(self, threads: int | None = None) -> None:
        """Decodes everything. Raises CorruptFile unless every byte is as it was packed."""
        for _ in self.read_blocks([key for keys in self._keys.values() for key in keys], threads):
            pass

    def file_blocks(self, path: str, threads: int | None = None) -> Generator[memoryview]:
        """The bytes of a packed file, block by block."""
        return self.read_blocks(self._keys[self._file(path)], threads)

    def _file(self, path: str) -> FileEntry:
        for entry in self._keys:
            if entry.path == path:
                return entry
        raise KeyError(f"{self.path} has no file {path!r}; it has {[entry.path for entry in self._keys]}")

    def read_blocks(self, keys: Sequence[str], threads: int | None = None) -> Generator[memoryview]:
        """Decoded blocks of the frames `keys`, one after the other."""
        with open(self.path, "rb") as file:
            frames = [self._frame(file, key) for key in keys]
            with closing(in_order(_decode, self._stored_blocks(file, keys, frames), threads)) as decoded:
                for key, frame in zip(keys, frames):
                    digest = xxhash.xxh3_64()
                    for _ in frame.blocks:
                        block = next(decoded)
                        digest.update(block)
                        yield block
                    if digest.intdigest() != frame.raw_xxh3:
                        raise CorruptFile(f"{self._where(key)}: checksum of the decoded bytes does not match")

    def _frame(self, file: BinaryIO, key: str) -> Frame:
        frame = read_frame(file, *self._ranges[key], self._where(key))
        expected = self._raw_nbytes.get(key)
        # how long a safetensors header is, is known only once it is decoded
        if frame.raw_nbytes != expected if expected is not None else frame.raw_nbytes > 8 + MAX_HEADER:
            raise CorruptFile(f"{self._where(key)}: frame of {frame.raw_nbytes} bytes, expected {expected}")
        return frame

    def _stored_blocks(
        self, file: BinaryIO, keys: Sequence[str], frames: list[Frame]
    ) -> Generator[tuple[bytes, Block, Form, int, str]]:
        for key, frame in zip(keys, frames):
            at = self._ranges[key][0] + frame.head_nbytes
            for index, block in enumerate(frame.blocks):
                where = f"{self._where(key)}, block {index}"
                stored = read_exactly(file, at, block.nbytes, where)
                yield stored, block, frame.form, frame.block_raw_nbytes(index), where
                at += block.nbytes

    def _where(self, key: str) -> str:
        return f"{self.path}: {f'tensor {key!r}' if key in self._tensors else key}"

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def stats(self) -> Stats:
        """Counted from the file: what each plane of each block takes."""
        shares: dict[str, list[int]] = {}

        def count(name: str, bytes_in: int, bytes_out: int) -> None:
            share = shares.setdefault(name, [0, 0])
            share[0] += bytes_in
            share[1] += bytes_out

        with open(self.path, "rb") as file:
            for key, (begin, _) in self._ranges.items():
                frame, where = self._frame(file, key), self._where(key)
                at = begin + frame.head_nbytes
                for index, block in enumerate(frame.blocks):
                    head = read_exactly(file, at, min(block.nbytes, RECORDS_NBYTES), where)
                    for plane, (_, stored) in enumerate(read_records(head, frame.form, where)):
                        kind = (
                            f"{self._tensors[key].dtype} {frame.form.plane_name(plane)}"
                            if key in self._tensors
                            else "files"
                        )
                        count(kind, frame.block_raw_nbytes(index) // frame.form.width, stored)
                    at += block.nbytes
        bytes_in = sum(entry.nbytes for entry in self.manifest.files)
        count("container", 0, self.nbytes - sum(bytes_out for _, bytes_out in shares.values()))
        return Stats(bytes_in, self.nbytes, {name: Share(*share) for name, share in shares.items()})

    def __repr__(self) -> str:
        return f"Packed({str(self.path)!r}: {len(self._tensors)} tensors, {len(self.manifest.files)} files)"


def _info(tensor: TensorEntry, file: FileEntry) -> TensorInfo:
    return TensorInfo(tensor.dtype, tensor.shape, tensor.end - tensor.begin, file.path)


def _decode(job: tuple[bytes, Block, Form, int, str]) -> memoryview:
    stored, block, form, raw_nbytes, where = job
    out = np.empty(raw_nbytes, np.uint8)
    decode_block(stored, block, form, out, where)
    return out.data


def _ends(file: BinaryIO, size: int, where: str) -> tuple[bytes, Trailer]:
    """Header and trailer of a packed file, checked against each other."""
    trailer = None
    if size >= Trailer.nbytes:
        trailer = Trailer.from_bytes(read_exactly(file, size - Trailer.nbytes, Trailer.nbytes, where), where)
    if trailer is None:
        if _was_packed(file, size, where):
            raise CorruptFile(f"{where}: the end of the file is lost or damaged; copy or pack it again")
        raise NotPacked(f"{where} is not a file that tersor.lossless packed")
    if trailer.file_nbytes != size:
        raise CorruptFile(f"{where}: {size} bytes, expected {trailer.file_nbytes}")
    nbytes = header_nbytes(read_exactly(file, 0, 8, where), size, where)
    header = read_exactly(file, 0, nbytes, where)
    if xxhash.xxh3_64_intdigest(header) != trailer.header_xxh3:
        raise CorruptFile(f"{where}: checksum of the header does not match")
    return header, trailer


def _was_packed(file: BinaryIO, size: int, where: str) -> bool:
    """The file has no trailer: does its header say that it should have one?"""
    try:
        nbytes = header_nbytes(read_exactly(file, 0, 8, where), size, where)
        metadata = parse_json(read_exactly(file, 8, nbytes - 8, where), where).get("__metadata__", {})
    except CorruptFile:
        return False
    return isinstance(metadata, dict) and METADATA in metadata
