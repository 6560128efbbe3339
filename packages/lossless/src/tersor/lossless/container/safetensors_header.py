"""The header of a safetensors file, read strictly: what the format forbids is an error, never a guess."""

import json
from math import prod
from typing import Any, NamedTuple

from ..errors import CorruptFile

MAX_HEADER = 100_000_000  # the limit of the safetensors library

# bits per element; a dtype that is not listed is packed as bytes
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """A tensor of a safetensors file; `begin` and `end` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_nbytes(prefix: bytes, file_nbytes: int, where: str) -> int:
    """Bytes of the whole header, its length word of 8 bytes included, from those first 8 bytes."""
    nbytes = 8 + int.from_bytes(prefix, "little")
    if len(prefix) < 8 or nbytes > min(file_nbytes, 8 + MAX_HEADER):
        raise CorruptFile(
            f"{where}: not a safetensors file (its {file_nbytes} bytes cannot hold the header they announce)"
        )
    return nbytes


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose names occur once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=once)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{where}: the header is no JSON object ({error})") from error
    if not isinstance(parsed, dict):
        raise CorruptFile(f"{where}: the header is no JSON object")
    return parsed


def parse_header(header: bytes, file_nbytes: int, where: str) -> list[TensorEntry]:
    """The tensors of a header (with its length word), in the order of their data, which they must fill without gaps."""
    entries = []
    for name, value in parse_json(header[8:], where).items():
        if name != "__metadata__":
            entries.append(_entry(name, value, where))
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise CorruptFile(f"{where}: {entry.name} begins at byte {entry.begin} of the data, expected {at}")
        at = entry.end
    if at != file_nbytes - len(header):
        raise CorruptFile(f"{where}: tensors fill {at} of {file_nbytes - len(header)} bytes of data")
    return entries


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{where}: {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise CorruptFile(f"{where}: {name} has no valid dtype, shape and data_offsets")
    begin, end = offsets
    if begin > end or (dtype in BITS and prod(shape) * BITS[dtype] != 8 * (end - begin)):
        raise CorruptFile(f"{where}: {name} of shape {shape} in {dtype} cannot take the bytes {begin} to {end}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    # type, not isinstance: True is an int too
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def format_header(entries: list[TensorEntry], metadata: dict[str, str], nbytes: int | None = None) -> bytes:
    """A header with its length word; with `nbytes`, padded to it with spaces, as the format allows."""
    described = {
        entry.name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        for entry in entries
    }
    text = json.dumps({"__metadata__": metadata} | described, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(nbytes - 8 if nbytes else 0)
    return len(text).to_bytes(8, "little") + text
