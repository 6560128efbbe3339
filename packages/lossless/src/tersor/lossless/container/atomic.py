"""Files and directories that appear whole or not at all: written beside the target, synced, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(target: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to write that becomes `target` when the block ends without an exception, and vanishes otherwise."""
    check_target(target, overwrite, directory=False)
    part = _beside(target)
    with _out_of_space_named(target):
        try:
            with open(part, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_target(target, overwrite, directory=False)
            os.replace(part, target)
            _sync_directory(target.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def new_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """The same for a directory. With `overwrite`, what `target` held before is gone."""
    check_target(target, overwrite, directory=True)
    part = _beside(target)
    with _out_of_space_named(target):
        try:
            part.mkdir()
            yield part
            for directory, _, _ in os.walk(part):
                _sync_directory(Path(directory))
            check_target(target, overwrite, directory=True)
            _replace_directory(part, target)
            _sync_directory(target.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_target(target: Path, overwrite: bool, directory: bool) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory: create it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another target or pass overwrite=True")
    if target.is_dir() != directory:
        raise FileExistsError(f"{target} is {'no' if directory else 'a'} directory: choose another target")


def check_space(target: Path, nbytes: int) -> None:
    """OSError if fewer than `nbytes` are free where `target` will lie."""
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"{nbytes:,} bytes are needed, {free:,} are free", str(target.parent))


def _replace_directory(part: Path, target: Path) -> None:
    if not target.is_dir():
        os.rename(part, target)
        return
    aside = _beside(target)
    os.rename(target, aside)
    try:
        os.rename(part, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


@contextmanager
def _out_of_space_named(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            raise OSError(errno.ENOSPC, "no space left; nothing was left behind", str(target.parent)) from error
        raise


def _beside(target: Path) -> Path:
    # a name of its own for each run: two runs with one target must not write into one file
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
