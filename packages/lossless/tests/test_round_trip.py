"""pack then unpack gives the same bytes, for every dtype, shape, order and recipe; noise hardly grows."""

import hashlib
import json
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tersor.lossless import Recipe, open_packed, pack, recipes, unpack
from tersor.lossless.coder import FixedPlanes, Huffman, Stored, Tiered, Zstd
from tersor.lossless.container import Frames
from tersor.lossless.layout import BytePlanes, ExponentSplit, Raw

RECIPES = [
    recipes.zipnn(),
    recipes.zstd(),
    Recipe(ExponentSplit(), Stored(), Frames(10)),
    Recipe(BytePlanes(), Zstd(1), Frames(10, Stored(), 10)),
    Recipe(Raw(), Huffman(), Frames(10)),
    recipes.dfloat11(block_log2=10),
    recipes.neuzip(block_log2=10),
    Recipe(ExponentSplit(), Tiered(), Frames(10, Tiered(), 10)),
    Recipe(BytePlanes(), FixedPlanes(4), Frames(10)),
]


def bound(source_bytes: int, header_bytes: int, things: int) -> float:
    """README.md, "Size": what packing can cost at most."""
    return 1.001 * source_bytes + 2 * header_bytes + 1024 * (things + 1)


def check_file(source: Path, recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as directory:
        packed, restored = Path(directory, "packed"), Path(directory, "restored")
        pack(source, packed, recipe, threads=2)
        assert unpack(packed, restored, threads=1).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, write_safetensors, random_bytes, dtype_bits, recipe):
    shapes = {"scalar": (), "none": (0, 5), "vector": (8,), "matrix": (60, 44), "long": (3, 4000)}
    tensors = [
        (f"{dtype}.{name}", dtype, shape, random_bytes(dtype, shape))
        for dtype in dtype_bits
        for name, shape in shapes.items()
        if prod(shape) * dtype_bits[dtype] % 8 == 0
    ]
    check_file(write_safetensors(tmp_path / "all.safetensors", tensors, {"a": "ü"}, backwards=True, spaces=3), recipe)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_file_of_any_tensors_comes_back(tmp_path, write_safetensors, random_bytes, dtype_bits, data):
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=6, unique=True))
    tensors = []
    for name in names:
        if name == "__metadata__":
            continue
        dtype = data.draw(st.sampled_from(sorted(dtype_bits)))
        shape = tuple(data.draw(st.lists(st.integers(0, 12), max_size=3)))
        if prod(shape) * dtype_bits[dtype] % 8:
            shape = (*shape, 4)
        tensors.append((name, dtype, shape, random_bytes(dtype, shape, seed=len(tensors))))
    metadata = data.draw(st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.just("x"), max_size=2))
    source = write_safetensors(
        tmp_path / "any", tensors, metadata, data.draw(st.booleans()), data.draw(st.integers(0, 9))
    )
    check_file(source, data.draw(st.sampled_from(RECIPES)))


def test_a_dtype_of_the_future_is_packed_as_bytes(tmp_path, write_safetensors):
    check_file(write_safetensors(tmp_path / "new", [("w", "F3_E1M1", (5,), b"\1\2")]), recipes.zipnn())


def test_nan_payloads_negative_zeros_and_subnormals_survive(tmp_path, write_safetensors):
    every = np.arange(2**16, dtype=np.uint16)
    f32 = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 1, 0x807FFFFF], np.uint32)
    tensors = [("bf16", "BF16", (2**16,), every.tobytes()), ("f32", "F32", (6,), f32.tobytes())]
    source = write_safetensors(tmp_path / "special", [*tensors, ("f16", "F16", (2**16,), every.tobytes())])
    check_file(source, recipes.zipnn())
    packed = pack(source, tmp_path / "packed")
    assert np.array_equal(packed.get_bytes("f32").view(np.uint32), f32)


def test_a_file_without_tensors_comes_back(tmp_path, write_safetensors):
    source = write_safetensors(tmp_path / "none.safetensors", [], {"format": "pt"})
    check_file(source, recipes.zipnn())
    assert pack(source, tmp_path / "packed").keys() == []


def test_a_directory_comes_back_whole(tmp_path, model_directory, tree):
    before = tree(model_directory)
    for recipe in RECIPES:
        pack(model_directory, tmp_path / "packed", recipe, overwrite=True)
        unpack(tmp_path / "packed", tmp_path / "restored", overwrite=True)
        assert tree(tmp_path / "restored") == before == tree(model_directory)


def test_links_to_files_are_packed_as_files(tmp_path, model_directory, tree):
    (tmp_path / "blob").write_bytes(b"content")
    (model_directory / "link.json").symlink_to(tmp_path / "blob")
    pack(model_directory, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "restored")
    assert not (tmp_path / "restored" / "link.json").is_symlink()
    assert tree(tmp_path / "restored") == tree(model_directory)


def test_a_packed_file_can_be_packed_again(tmp_path, model_directory):
    pack(model_directory, tmp_path / "once")
    pack(tmp_path / "once", tmp_path / "twice")
    unpack(tmp_path / "twice", tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == (tmp_path / "once").read_bytes()


def test_names_that_occur_in_two_files_are_told_apart(tmp_path, model_directory, write_safetensors, tree):
    write_safetensors(model_directory / "adapter.safetensors", [("up", "U8", (3,), b"abc")])
    packed = pack(model_directory, tmp_path / "packed")
    assert packed.get_bytes("adapter.safetensors:up").tobytes() == b"abc"
    assert set(packed.keys()) > {"model-00001-of-00002.safetensors:up", "model-00002-of-00002.safetensors:down"}
    unpack(packed.path, tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(model_directory)


def test_threads_do_not_change_the_packed_bytes(tmp_path, model_directory):
    for threads in (1, 2, 5, None):
        pack(model_directory, tmp_path / f"{threads}", Recipe(container=Frames(10)), threads=threads)
    assert len({hashlib.sha256((tmp_path / f"{n}").read_bytes()).digest() for n in (1, 2, 5, None)}) == 1


def test_the_source_may_be_read_only_and_stays_as_it_was(tmp_path, model_directory, tree):
    before = tree(model_directory)
    for path in model_directory.rglob("*.safetensors"):
        path.chmod(0o444)
    pack(model_directory, tmp_path / "packed")
    assert tree(model_directory) == before


def test_the_packed_file_is_a_safetensors_file(tmp_path, model_directory):
    pack(model_directory, tmp_path / "packed.safetensors")
    with safe_open(tmp_path / "packed.safetensors", "np") as file:
        assert file.metadata() == {"tersor.lossless": "1"}
        assert {"up", "down", "norm", "__tersor__", "__tersor__/file/config.json"} < set(file.keys())
        assert file.get_tensor("up")[:4].tobytes() == b"TLF1"


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
@pytest.mark.parametrize("dtype", ["U8", "BF16", "F64"])
@pytest.mark.parametrize("n", [0, 1, 300, 600_000])
def test_noise_grows_by_no_more_than_the_stated_bound(tmp_path, write_safetensors, random_bytes, recipe, dtype, n):
    tensors = [(f"{i}", dtype, (n,), random_bytes(dtype, (n,), i)) for i in range(3)]
    source = write_safetensors(tmp_path / "noise", tensors)
    size = source.stat().st_size
    header = size - sum(len(data) for *_, data in tensors)
    assert pack(source, tmp_path / "packed", recipe).nbytes <= bound(size, header, 3 + 1)


def test_quantised_weights_cost_almost_nothing(tmp_path, write_safetensors, random_bytes):
    codes = ("codes", "U8", (1024, 1024), random_bytes("U8", (1024, 1024)))  # packed int4
    stats = pack(write_safetensors(tmp_path / "q.safetensors", [codes]), tmp_path / "packed").stats
    assert stats.shares["U8 bytes"].bytes_out == 2**20
    assert 1 <= stats.ratio < 1.002


def test_index_of_shards_is_restored_as_text(tmp_path, model_directory):
    packed = pack(model_directory, tmp_path / "packed")
    assert "weight_map" in json.loads(packed.get_file("model.safetensors.index.json"))
    assert open_packed(packed.path).get_file("config.json") == (model_directory / "config.json").read_bytes()
