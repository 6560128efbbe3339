"""No damaged or hostile file gives wrong data, or fails otherwise than by a LosslessError."""

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.lossless import Recipe, open_packed, pack, recipes, unpack
from tersor.lossless.coder import FixedPlanes, Huffman, Prefix6, Rans11, Tiered
from tersor.lossless.container import Frames
from tersor.lossless.container.manifest import Manifest, unsafe_paths
from tersor.lossless.container.packed import Packed
from tersor.lossless.container.writer import components, manifest_of, read_source, write_packed
from tersor.lossless.errors import CorruptFile, LosslessError, NotPacked, UnsupportedVersion

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


@pytest.fixture
def small(request, tmp_path, model_directory):
    """A packed file with several blocks per tensor, and its bytes; its coder may be chosen."""
    recipe = Recipe(coder=getattr(request, "param", Huffman()), container=Frames(10))
    path = pack(model_directory, tmp_path / "packed", recipe).path
    return path, path.read_bytes()


def xxh3(data: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def test_every_flipped_byte_is_found(small):
    path, data = small
    rng = np.random.default_rng(0)
    for at in [*range(0, len(data), 11), *range(len(data) - 64, len(data)), *range(16)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(LosslessError, match=str(path)):
            Packed(path).verify(threads=1)


def test_every_truncation_is_found(small):
    path, data = small
    for size in [*range(0, len(data), 41), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(LosslessError, match=str(path)):
            Packed(path)


@FUZZ
@given(data=st.data())
def test_cut_doubled_and_overwritten_pieces_are_found(small, data):
    path, good = small
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    noise = data.draw(st.binary(min_size=1, max_size=12))
    damaged = data.draw(
        st.sampled_from([good[:begin] + good[end:], good[:end] + good[begin:], good[:begin] + noise + good[begin:]])
    )
    if damaged == good:
        return
    path.write_bytes(damaged)
    with pytest.raises(LosslessError):
        Packed(path).verify(threads=1)


@pytest.mark.parametrize("small", [Huffman(), Rans11(), Prefix6(), Tiered(), FixedPlanes()], indirect=True, ids=str)
@settings(FUZZ, max_examples=80)
@given(data=st.data())
def test_frames_with_forged_checksums_give_the_right_bytes_or_an_error(small, data):
    path, good = small
    path.write_bytes(good)
    reader = Packed(path)
    name = data.draw(st.sampled_from(sorted(reader._ranges)))
    begin, end = reader._ranges[name]
    expected = b"".join(bytes(block) for block in reader.read_blocks([name], 1))
    frame = bytearray(good[begin:end])
    (n_blocks,) = struct.unpack_from("<I", frame, 16)
    head = (64 + 16 * n_blocks + 63) // 64 * 64
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(frame) - 1) | st.integers(0, min(head + 70, len(frame)) - 1))
        frame[at] = data.draw(st.integers(0, 255))
    at = head
    for block in range(n_blocks):  # seal the blocks again, as far as they lie inside
        (size,) = struct.unpack_from("<I", frame, 64 + 16 * block + 8)
        frame[64 + 16 * block : 72 + 16 * block] = xxh3(frame[at : at + size])
        at += size
    frame[56:64] = xxh3(frame[:56] + frame[64:head])
    path.write_bytes(good[:begin] + frame + good[end:])
    try:
        decoded = b"".join(bytes(block) for block in Packed(path).read_blocks([name], 1))
    except LosslessError:
        return
    assert decoded == expected


@pytest.mark.parametrize("small", [Rans11(), Prefix6(), Tiered(), FixedPlanes()], indirect=True, ids=str)
@pytest.mark.parametrize("at", [4, 64 + 8, 64 + 16], ids=["plane is shorter", "head is wrong", "stream is wrong"])
def test_a_damaged_plane_under_a_right_checksum_is_refused_and_its_tensor_named(small, at):
    path, good = small
    begin, end = Packed(path)._ranges["up"]
    frame = bytearray(good[begin:end])
    head = (64 + 16 * 3 + 63) // 64 * 64  # three blocks; then the first one's records, and at 64 its first plane
    (size,) = struct.unpack_from("<I", frame, 64 + 8)
    frame[head + at] ^= 1
    frame[64:72] = xxh3(frame[head : head + size])
    frame[56:64] = xxh3(frame[:56] + frame[64:head])
    path.write_bytes(good[:begin] + frame + good[end:])
    with pytest.raises(CorruptFile, match=r"packed: tensor 'up'(, block 0)?: \S"):
        Packed(path).get_bytes("up")
    assert len(Packed(path).get_bytes("norm")) == 4 * 64


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        "",
        ".",
        "a/.",
        "C:/x",
        "C:x",
        "\\\\host\\x",
        "a\\..\\b",
        "a\0b",
        "a/",
    ],
)
def test_paths_that_leave_the_directory_are_refused(tmp_path, write_safetensors, name):
    source = read_source(write_safetensors(tmp_path / "m.safetensors", []), name, tensors=True)
    manifest = manifest_of([source], (), True, recipes.zipnn())
    with open(tmp_path / "packed", "wb") as file:
        write_packed(file, components([source], manifest, recipes.zipnn()), manifest, 1, None)
    with pytest.raises(CorruptFile, match=r"packed: manifest: .*is no relative path of plain names"):
        unpack(tmp_path / "packed", tmp_path / "restored")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "packed"]


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"]], ids=str)
def test_paths_that_collide_are_refused(paths):
    assert unsafe_paths(paths)
    assert not unsafe_paths(["a", "b/a", "b/c", "ab"])


@settings(FUZZ, max_examples=100)
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    field=st.sampled_from(["directory", "qualified", "files", "empty_directories", "recipe"]),
)
def test_no_manifest_fails_otherwise(content, field):
    valid = json.loads(Manifest((), ("d",)).to_bytes())
    with suppress(LosslessError):
        Manifest.from_bytes(json.dumps(valid | {field: content}).encode(), "file")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "a": {}}',
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}',
        '{"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 1e0]}}',
        '{"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}}',
        '{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, true]}}',
        '{"a": {"dtype": "F64", "shape": [2305843009213693953], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
        '{"a": {"dtype": 3, "shape": [4], "data_offsets": [0, 4]}}',
        '{"\\ud800": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        '{"a": 1}', "[]", "{", "", "[" * 5000, '"' + "9" * 5000,
    ],
)  # fmt: skip
def test_files_that_are_no_safetensors_are_named_and_not_packed(tmp_path, text):
    (tmp_path / "bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"1234")
    with pytest.raises(CorruptFile, match=r"bad\.safetensors: "):
        pack(tmp_path / "bad.safetensors", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 8 + b"{}", b"version https://git-lfs"], ids=str
)
def test_headers_longer_than_the_file_are_refused(tmp_path, data):
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CorruptFile, match=r"bad\.safetensors: not a safetensors file"):
        pack(tmp_path / "bad.safetensors", tmp_path / "packed")


def test_other_files_are_not_packed_files(tmp_path, write_safetensors):
    for path in (write_safetensors(tmp_path / "m.safetensors", [("a", "U8", (99,), bytes(99))]), tmp_path / "text"):
        (tmp_path / "text").write_text("text " * 30)
        with pytest.raises(NotPacked, match="is not a file that tersor.lossless packed"):
            open_packed(path)


def test_newer_versions_are_named(small):
    path, data = small
    trailer = bytearray(data[-64:])
    trailer[8:12] = struct.pack("<I", 2)
    path.write_bytes(data[:-64] + trailer[:-8] + xxh3(trailer[:-8]))
    with pytest.raises(UnsupportedVersion, match="format version 2, this tersor.lossless reads up to 1"):
        open_packed(path)


def test_a_damaged_file_leaves_no_target(small, tmp_path):
    path, data = small
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 16
    path.write_bytes(damaged)
    with pytest.raises(CorruptFile):
        unpack(path, tmp_path / "restored")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "packed"]
