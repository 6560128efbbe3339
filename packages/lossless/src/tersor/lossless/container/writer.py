"""Writes a packed file: frames first, the header last into the room that was left for it."""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from ..coder.stored import Coder
from ..errors import LosslessError
from ..layout.planes import Form, Raw
from ..recipe import Recipe
from .frames import Block, Frame, encode_block, frame_bound, head_nbytes, n_blocks, padded
from .manifest import MANIFEST, METADATA, VERSION, FileEntry, Manifest, Trailer
from .safetensors_header import MAX_HEADER, TensorEntry, format_header, header_nbytes, parse_header
from .workers import in_order

Progress = Callable[[int, int], None]


class SourceFile(NamedTuple):
    """A file to pack: `tensors` and their `header_nbytes` if it is a safetensors file."""

    entry: FileEntry
    path: Path
    mtime_ns: int
    header_nbytes: int
    tensors: list[TensorEntry]


class Component(NamedTuple):
    """What becomes one frame: `nbytes` bytes of a file."""

    key: str
    source: SourceFile
    nbytes: int
    form: Form
    coder: Coder
    block_log2: int

    @property
    def n_blocks(self) -> int:
        return n_blocks(self.form, self.block_log2, self.nbytes)

    @property
    def head_nbytes(self) -> int:
        return head_nbytes(self.form, self.block_log2, self.nbytes)


def read_source(path: Path, name: str, tensors: bool) -> SourceFile:
    """What is to be known of a file before it is packed. Raises CorruptFile for a safetensors file that is none."""
    stat = path.stat()
    entry = FileEntry(name, stat.st_size, tensors)
    if not tensors:
        return SourceFile(entry, path, stat.st_mtime_ns, 0, [])
    with open(path, "rb") as file:
        prefix = file.read(8)
        nbytes = header_nbytes(prefix, stat.st_size, str(path))
        header = prefix + file.read(nbytes - 8)
    return SourceFile(entry, path, stat.st_mtime_ns, nbytes, parse_header(header, stat.st_size, str(path)))


def manifest_of(
    sources: list[SourceFile], empty_directories: tuple[str, ...], directory: bool, recipe: Recipe
) -> Manifest:
    """Tensors are found by their names, or by `path:name` where a name occurs in two files or is one of our own."""
    names = [tensor.name for source in sources for tensor in source.tensors]
    qualified = len(set(names)) != len(names) or any(name.startswith(MANIFEST) for name in names)
    return Manifest(tuple(source.entry for source in sources), empty_directories, directory, qualified, repr(recipe))


def components(sources: list[SourceFile], manifest: Manifest, recipe: Recipe) -> list[Component]:
    """The frames in the order of the bytes that they pack: per file its header, then its tensors."""
    frames, found = recipe.container, []
    files = (Raw().form(""), frames.files_coder, frames.files_block_log2)
    for source in sources:
        whole = source.header_nbytes if source.entry.tensors else source.entry.nbytes
        found.append(Component(source.entry.key, source, whole, *files))
        for tensor in source.tensors:
            form, nbytes = recipe.layout.form(tensor.dtype), tensor.end - tensor.begin
            key = manifest.key(source.entry, tensor.name)
            found.append(Component(key, source, nbytes, form, recipe.coder, frames.block_log2))
    keys = {component.key for component in found} | {MANIFEST}
    if len(keys) != len(found) + 1:
        raise LosslessError("two tensors would have one key `path:name`: rename a file whose name contains ':'")
    return found


def write_packed(
    file: BinaryIO, parts: list[Component], manifest: Manifest, threads: int | None, progress: Progress | None
) -> None:
    """The packed file into `file`, empty and seekable. `progress(done, total)` counts bytes of the sources."""
    manifest_bytes = manifest.to_bytes()
    bounds = [frame_bound(part.form, part.block_log2, part.nbytes) for part in parts]
    end = sum(bounds) + len(manifest_bytes) + Trailer.nbytes
    longest = [TensorEntry(part.key, "U8", (bound,), end, end) for part, bound in zip(parts, bounds)]
    longest.append(TensorEntry(MANIFEST, "U8", (end,), end, end))
    metadata = {METADATA: str(VERSION)}
    header_size = padded(len(format_header(longest, metadata)))
    if header_size > 8 + MAX_HEADER:
        raise LosslessError(
            f"{len(parts)} tensors need a header over the limit of {MAX_HEADER:,} bytes: pack fewer at once"
        )

    done, total = 0, sum(part.nbytes for part in parts)
    digests = [xxhash.xxh3_64() for _ in parts]
    entries, at = [], header_size
    with closing(in_order(_encode, _blocks(parts, digests), threads)) as encoded:
        for part, digest in zip(parts, digests):
            file.seek(at + part.head_nbytes)
            blocks: list[Block] = []
            for _ in range(part.n_blocks):
                stored, block, raw_nbytes = next(encoded)
                file.write(stored)
                blocks.append(block)
                done += raw_nbytes
                if progress:
                    progress(done, total)
            frame = Frame(part.form, part.block_log2, part.nbytes // part.form.width, digest.intdigest(), tuple(blocks))
            file.seek(at)
            file.write(frame.to_bytes())
            entries.append(
                TensorEntry(part.key, "U8", (frame.nbytes,), at - header_size, at - header_size + frame.nbytes)
            )
            at += frame.nbytes
        for _ in encoded:  # runs the last checks of `_blocks`
            raise AssertionError("more blocks than planned")

    size = len(manifest_bytes) + Trailer.nbytes
    entries.append(TensorEntry(MANIFEST, "U8", (size,), at - header_size, at - header_size + size))
    header = format_header(entries, metadata, header_size)
    trailer = Trailer(
        at + size, len(manifest_bytes), xxhash.xxh3_64_intdigest(header), xxhash.xxh3_64_intdigest(manifest_bytes)
    )
    file.seek(at)
    file.write(manifest_bytes + trailer.to_bytes())
    file.seek(0)
    file.write(header)


def _encode(job: tuple[np.ndarray, Component]) -> tuple[bytes, Block, int]:
    raw, part = job
    return *encode_block(raw, part.form, part.coder), raw.nbytes


def _blocks(parts: list[Component], digests: list[xxhash.xxh3_64]) -> Generator[tuple[np.ndarray, Component]]:
    """All blocks in order; each file is read once, from its start to its end."""
    at = 0
    while at < len(parts):
        source = parts[at].source
        with open(source.path, "rb") as file:
            while at < len(parts) and parts[at].source is source:
                part, left = parts[at], parts[at].nbytes
                while left:
                    wanted = min(left, part.form.width << part.block_log2)
                    raw = np.fromfile(file, np.uint8, wanted)
                    if raw.nbytes != wanted:
                        raise LosslessError(f"{source.path} became shorter while it was packed: pack it again")
                    digests[at].update(raw.data)
                    left -= raw.nbytes
                    yield raw, part
                at += 1
            stat = source.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (source.entry.nbytes, source.mtime_ns):
                raise LosslessError(f"{source.path} changed while it was packed: pack it again")
