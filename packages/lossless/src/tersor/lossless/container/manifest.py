"""The manifest: which files a packed file restores. The trailer: the last 64 bytes, which tell and check the file."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

import xxhash

from ..errors import CorruptFile, UnsupportedVersion
from .frames import ALIGNMENT
from .safetensors_header import parse_json

MANIFEST = "__tersor__"  # the tensor that holds manifest and trailer; the last of the file
METADATA = "tersor.lossless"
VERSION = 1

_MAGIC = b"TERSORLL"
_TRAILER = struct.Struct("<8sI4x4Q8xQ")


@dataclass(frozen=True)
class FileEntry:
    """A file to restore: `path` with forward slashes, relative; its tensors have frames of their own if `tensors`."""

    path: str
    nbytes: int
    tensors: bool

    @property
    def key(self) -> str:
        """The frame of a file without tensors, or of the header of a file with them."""
        return f"{MANIFEST}/{'header' if self.tensors else 'file'}/{self.path}"


@dataclass(frozen=True)
class Manifest:
    """`directory`: not a single file was packed. `qualified`: keys are `path:name`, not the names of tensors."""

    files: tuple[FileEntry, ...]
    empty_directories: tuple[str, ...] = ()
    directory: bool = True
    qualified: bool = False
    recipe: str = ""

    def key(self, file: FileEntry, name: str) -> str:
        return f"{file.path}:{name}" if self.qualified else name

    def to_bytes(self) -> bytes:
        content = {
            "version": VERSION,
            "directory": self.directory,
            "qualified": self.qualified,
            "files": [[file.path, file.nbytes, file.tensors] for file in self.files],
            "empty_directories": list(self.empty_directories),
            "recipe": self.recipe,
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        return text + b" " * (-len(text) % ALIGNMENT)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        content = parse_json(data, where)
        try:
            files = tuple(FileEntry(path, nbytes, tensors) for path, nbytes, tensors in content["files"])
            manifest = cls(
                files,
                tuple(content["empty_directories"]),
                content["directory"],
                content["qualified"],
                content["recipe"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{where}: the manifest is incomplete ({error!r})") from error
        if not all(
            isinstance(flag, bool) for flag in (manifest.directory, manifest.qualified, *(f.tensors for f in files))
        ):
            raise CorruptFile(f"{where}: the manifest is malformed")
        if not all(type(file.nbytes) is int and file.nbytes >= 0 for file in files):
            raise CorruptFile(f"{where}: the manifest is malformed")
        if not manifest.directory and len(files) != 1:
            raise CorruptFile(f"{where}: a single file is announced, {len(files)} are listed")
        reason = unsafe_paths([*(file.path for file in files), *manifest.empty_directories])
        if reason:
            raise CorruptFile(f"{where}: {reason}")
        return manifest


def unsafe_paths(paths: Iterable[str]) -> str | None:
    """Why `paths` may not be created below a directory, or None: each must stay inside and be a file of its own."""
    paths = list(paths)
    for path in paths:
        if not isinstance(path, str):
            return f"{path!r} is no path"
        windows = PureWindowsPath(path)
        parts = path.split("/")
        if not path or "\0" in path or "\\" in path or windows.drive or windows.root or {"", ".", ".."} & set(parts):
            return f"{path!r} is no relative path of plain names"
    if len(set(paths)) != len(paths):
        return "a path occurs twice"
    parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    for path in paths:
        if path in parents:
            return f"{path!r} is both a file and a directory"
    return None


@dataclass(frozen=True)
class Trailer:
    file_nbytes: int
    manifest_nbytes: int
    header_xxh3: int
    manifest_xxh3: int
    version: int = VERSION

    nbytes = _TRAILER.size

    def to_bytes(self) -> bytes:
        fields = (self.version, self.file_nbytes, self.manifest_nbytes, self.header_xxh3, self.manifest_xxh3)
        body = _TRAILER.pack(_MAGIC, *fields, 0)[:-8]
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Trailer | None":
        """None if there is none: the file is not packed, or its end is lost."""
        if len(data) != _TRAILER.size or not data.startswith(_MAGIC):
            return None
        _, version, file_nbytes, manifest_nbytes, header_xxh3, manifest_xxh3, xxh3 = _TRAILER.unpack(data)
        if xxhash.xxh3_64_intdigest(data[:-8]) != xxh3:
            raise CorruptFile(f"{where}: checksum of the trailer does not match")
        if version > VERSION:
            raise UnsupportedVersion(
                f"{where}: format version {version}, this tersor.lossless reads up to {VERSION}; update it"
            )
        return cls(file_nbytes, manifest_nbytes, header_xxh3, manifest_xxh3, version)
