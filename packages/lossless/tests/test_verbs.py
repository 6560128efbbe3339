"""What pack and unpack do to the disk: whole targets or none, little memory, clear refusals."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest

from tersor.lossless import Recipe, pack, recipes, unpack
from tersor.lossless.container import Frames
from tersor.lossless.errors import LosslessError

PACK_SLOWLY = """
import signal, sys, time
from tersor.lossless import Recipe, pack
from tersor.lossless.container import Frames

def progress(done, total):
    print(done, flush=True)
    time.sleep(0.2)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
pack(sys.argv[1], sys.argv[2], Recipe(container=Frames(10)), progress=progress, threads=2)
"""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_killed_pack_leaves_no_target(tmp_path, model_directory, kind):
    process = subprocess.Popen(
        [sys.executable, "-c", PACK_SLOWLY, str(model_directory), str(tmp_path / "packed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(kind)
    assert process.wait() != 0
    process.stdout.close()
    assert not (tmp_path / "packed").exists()
    if kind == signal.SIGINT:
        assert names(tmp_path) == ["model"]
    pack(model_directory, tmp_path / "packed").verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_takes_the_temporary_away(tmp_path, model_directory, error, threads):
    def interrupt(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(error):
        pack(model_directory, tmp_path / "packed", Recipe(container=Frames(10)), progress=interrupt, threads=threads)
    assert names(tmp_path) == ["model"]
    packed = pack(model_directory, tmp_path / "packed")
    with pytest.raises(error):
        unpack(packed.path, tmp_path / "restored", progress=interrupt, threads=threads)
    assert names(tmp_path) == ["model", "packed"]


def test_targets_are_kept_unless_overwrite(tmp_path, model_directory, tree):
    (tmp_path / "packed").write_text("precious")
    with pytest.raises(FileExistsError, match="packed exists: choose another target or pass overwrite=True"):
        pack(model_directory, tmp_path / "packed")
    assert (tmp_path / "packed").read_text() == "precious"
    packed = pack(model_directory, tmp_path / "packed", overwrite=True)
    (tmp_path / "restored").mkdir()
    (tmp_path / "restored" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="restored exists"):
        unpack(packed.path, tmp_path / "restored")
    unpack(packed.path, tmp_path / "restored", overwrite=True)
    assert tree(tmp_path / "restored") == tree(model_directory)
    with pytest.raises(FileExistsError, match="packed is no directory"):
        unpack(shutil.copy(packed.path, tmp_path / "copy"), packed.path, overwrite=True)
    with pytest.raises(FileExistsError, match="restored is a directory"):
        pack(model_directory, tmp_path / "restored", overwrite=True)
    assert names(tmp_path) == ["copy", "model", "packed", "restored"]


def test_source_and_target_must_lie_apart(tmp_path, model_directory):
    with pytest.raises(ValueError, match="lies in the source"):
        pack(model_directory, model_directory / "packed")
    with pytest.raises(ValueError, match="lies in the source"):
        pack(model_directory / "model-00002-of-00002.safetensors", model_directory / "model-00002-of-00002.safetensors")
    packed = pack(model_directory, tmp_path / "packed")
    with pytest.raises(ValueError, match="would be replaced"):
        unpack(packed.path, tmp_path, overwrite=True)


def test_missing_things_are_named(tmp_path, model_directory):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        pack(tmp_path / "nowhere", tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="nowhere is no directory: create it first"):
        pack(model_directory, tmp_path / "nowhere" / "packed")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.bin").write_bytes(b"pickle")
    with pytest.raises(LosslessError, match=r"bare holds no \.safetensors file: there is nothing to pack"):
        pack(tmp_path / "bare", tmp_path / "packed")
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        pack(model_directory, tmp_path / "packed", "zipnn")  # pyright: ignore
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        pack(model_directory, tmp_path / "packed", threads=0)
    assert names(tmp_path) == ["bare", "model"]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_what_cannot_be_restored_is_refused(tmp_path, model_directory):
    (model_directory / "loop").symlink_to(model_directory)
    with pytest.raises(LosslessError, match="loop is a link to a directory"):
        pack(model_directory, tmp_path / "packed")
    (model_directory / "loop").unlink()
    os.mkfifo(model_directory / "pipe")
    with pytest.raises(LosslessError, match="pipe is no regular file"):
        pack(model_directory, tmp_path / "packed")
    (model_directory / "pipe").unlink()
    (model_directory / "back\\slash").write_text("")
    with pytest.raises(LosslessError, match="is no relative path of plain names: rename it"):
        pack(model_directory, tmp_path / "packed")


def test_a_file_that_changes_meanwhile_is_named(tmp_path, model_directory):
    def write(done, total):
        with open(model_directory / "model-00001-of-00002.safetensors", "r+b") as file:
            file.truncate(file.seek(0, 2) - 1)

    with pytest.raises(LosslessError, match="model-00001-of-00002.safetensors .*while it was packed"):
        pack(model_directory, tmp_path / "packed", Recipe(container=Frames(10)), progress=write, threads=1)
    assert names(tmp_path) == ["model"]


def test_too_little_space_is_found_before_work_begins(tmp_path, model_directory, monkeypatch):
    packed = pack(model_directory, tmp_path / "packed")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    for act in (lambda: pack(model_directory, tmp_path / "again"), lambda: unpack(packed.path, tmp_path / "restored")):
        with pytest.raises(OSError, match="bytes are needed, 1,000 are free") as raised:
            act()
        assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["model", "packed"]


def test_running_out_of_space_is_named_and_leaves_nothing(tmp_path, model_directory):
    def full(done, total):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="no space left; nothing was left behind") as raised:
        pack(model_directory, tmp_path / "packed", progress=full)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert names(tmp_path) == ["model"]


def test_progress_runs_from_start_to_total(tmp_path, model_directory, tree):
    total = sum(len(data) for data in tree(model_directory).values() if data is not None)
    calls = []
    packed = pack(model_directory, tmp_path / "packed", progress=lambda *call: calls.append(call))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    calls.clear()
    unpack(packed.path, tmp_path / "restored", progress=lambda *call: calls.append(call))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_memory_does_not_grow_with_the_file(tmp_path, write_safetensors):
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (10 * 2**20, 40 * 2**20)
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8).tobytes()
        for _ in range(40):
            file.write(noise)
    recipe = recipes.zipnn(block_log2=16)  # blocks of 256 KiB
    # once before: the first call imports and compiles the kernels
    unpack(pack(tmp_path / "large.safetensors", tmp_path / "first", recipe).path, tmp_path / "restored-first")
    tracemalloc.start()
    try:
        pack(tmp_path / "large.safetensors", tmp_path / "packed", recipe, threads=2)
        unpack(tmp_path / "packed", tmp_path / "restored", threads=2)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_two_packs_with_one_target_do_not_mix(tmp_path, model_directory, tree):
    started = []

    def nested(done, total):
        if not started:
            started.append(pack(model_directory, tmp_path / "packed", recipes.zstd()))

    with pytest.raises(FileExistsError, match="packed exists"):
        pack(model_directory, tmp_path / "packed", progress=nested)
    unpack(tmp_path / "packed", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(model_directory)
    assert names(tmp_path) == ["model", "packed", "restored"]
