"""Size and speed of pack and unpack on 64 MiB of Gaussian bfloat16 weights, beside zstd on the whole file and ZipNN.

    pytest packages/lossless/benchmarks/bench_pack.py --benchmark-only

Single-threaded and in a memory file system where there is one, so that it is coding that is measured. `extra_info` of
each row holds its ratio (packed bytes / bytes) and GB/s of unpacked bytes. ZipNN takes part if it is installed.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from tersor.lossless import Recipe, open_packed, pack, recipes, unpack
from tersor.lossless.coder import FixedPlanes, Tiered

RECIPES = {
    "zipnn recipe": recipes.zipnn(),
    "neuzip recipe": recipes.neuzip(),
    "dfloat11 recipe": recipes.dfloat11(),
    "Tiered": Recipe(coder=Tiered()),
    "FixedPlanes": Recipe(coder=FixedPlanes()),
    "zstd recipe": recipes.zstd(),
}
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def source():
    directory = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    generator = torch.Generator().manual_seed(0)
    scales = 0.02 * torch.exp(0.3 * torch.randn(8, 2048, 1, generator=generator))
    weights = (scales * torch.randn(8, 2048, 2048, generator=generator)).bfloat16()
    save_file({f"layer.{i}": weight.clone() for i, weight in enumerate(weights)}, directory / "model.safetensors")
    yield directory / "model.safetensors"
    shutil.rmtree(directory)


def note(benchmark, nbytes: int, packed_nbytes: int) -> None:
    benchmark.extra_info["ratio"] = round(packed_nbytes / nbytes, 4)
    benchmark.extra_info["GB/s"] = round(nbytes / benchmark.stats.stats.min / 1e9, 2)


def run(benchmark, function):
    return benchmark.pedantic(function, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", RECIPES)
def test_pack(benchmark, source, name):
    benchmark.group = "pack"
    packed = run(benchmark, lambda: pack(source, source.with_name("p"), RECIPES[name], overwrite=True, threads=1))
    note(benchmark, source.stat().st_size, packed.nbytes)


@pytest.mark.parametrize("name", RECIPES)
def test_unpack(benchmark, source, name):
    benchmark.group = "unpack"
    packed = pack(source, source.with_name("p"), RECIPES[name], overwrite=True)
    run(benchmark, lambda: unpack(packed.path, source.with_name("u"), overwrite=True, threads=1))
    note(benchmark, source.stat().st_size, packed.nbytes)


@pytest.mark.parametrize("name", RECIPES)
def test_read_one_tensor(benchmark, source, name):
    benchmark.group = "one tensor of eight"
    packed = pack(source, source.with_name("p"), RECIPES[name], overwrite=True)
    run(benchmark, lambda: open_packed(packed.path).get_tensor("layer.3", threads=1))
    note(benchmark, packed.info("layer.3").nbytes, packed.nbytes // 8)


def test_pack_zstd_whole_file(benchmark, source):
    benchmark.group = "pack"
    coded = run(benchmark, lambda: zstandard.compress(source.read_bytes(), 3))
    note(benchmark, source.stat().st_size, len(coded))


def test_unpack_zstd_whole_file(benchmark, source):
    benchmark.group = "unpack"
    coded = zstandard.compress(source.read_bytes(), 3)
    assert run(benchmark, lambda: zstandard.decompress(coded)) == source.read_bytes()
    note(benchmark, source.stat().st_size, len(coded))


def peer():
    return pytest.importorskip("zipnn").ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)


def test_pack_zipnn_peer(benchmark, source):
    benchmark.group = "pack"
    zipnn = peer()
    # a fresh copy each time: it rotates the bytes of its input in place
    coded = run(benchmark, lambda: zipnn.compress(bytearray(source.read_bytes())))
    note(benchmark, source.stat().st_size, len(coded))


def test_unpack_zipnn_peer(benchmark, source):
    benchmark.group = "unpack"
    zipnn = peer()
    coded = bytes(zipnn.compress(bytearray(source.read_bytes())))
    restored = run(benchmark, lambda: zipnn.decompress(coded))
    assert np.array_equal(np.frombuffer(restored, np.uint8), np.fromfile(source, np.uint8))
    note(benchmark, source.stat().st_size, len(coded))
