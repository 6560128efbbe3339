"""Jobs that take long and must leave their target whole or absent, and go on where they were stopped.

All is made in a hidden folder beside the target and renamed at the end. Each stage leaves one file or folder there,
itself renamed into place; a second run of the same job goes on after the last of them.
"""

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor.integration.errors import UserError


def refuse_several_processes() -> None:
    """Raises UserError under torchrun."""
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"WORLD_SIZE is {world_size}, but all processes would do the same work: run the command in one; to calibrate in "
            f"parallel, call tersor.quant.quantize from Python"
        )


def done_before(out: Path, job: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The report of `out` if this very job has made it; None if `out` may be written.

    Raises:
        UserError: there is something else.
    """
    if not out.exists() or overwrite:
        return None
    if (report := finished(out)) and report.get("job") == job:
        return report
    raise UserError(f"{out} exists already; use --overwrite, or another --out")


def finished(out: Path) -> dict[str, Any] | None:
    """The report of the job that made `out`; None if `out` is nothing of ours."""
    try:
        return json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def work_folder(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder beside `out` for this job; what another job left there is thrown away.

    After an error it stays if there is something in it to go on from.

    Raises:
        UserError: another process works there, or the disk is full.
    """
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            if _read_json(work / "job.json") != job:
                for path in work.iterdir():
                    _remove(path)
            write_json(work / "job.json", job)
            try:
                yield work
            finally:
                if not _has_finished_work(work):
                    _remove(work)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left beside {out}: free some, then run the same command to go on") from error
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process gets here with the same folder; a lock is gone with the process that holds it."""
    if not importlib.util.find_spec("fcntl"):  # Windows
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process works in {folder}: wait for it, or choose another --out") from error
    except OSError:
        pass  # network file systems do not lock directories
    try:
        yield
    finally:
        os.close(descriptor)


def _has_finished_work(work: Path) -> bool:
    """Whether a stage was finished, or one of the files of a model that is streamed."""
    patterns = ("*.json", "result", ".result.unfinished/*.safetensors")
    return any(path.name != "job.json" for pattern in patterns for path in work.glob(pattern))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """What `path` holds from an earlier run, else made now and written there."""
    if not path.exists():
        write_json(path, make())
    return _read_json(path)


def made(folder: Path, make: Callable[[Path], None]) -> None:
    """`folder`, if an earlier run has not made it."""
    if folder.exists():
        return
    beside = folder.with_suffix(".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    make(beside)
    beside.replace(folder)


def publish(work: Path, result: Path, out: Path, *others: str) -> None:
    """Turn `result` and `others`, all in `work`, into `out`: from here on only renames, the last of which makes it appear."""
    for name in others:
        if (work / name).exists():
            (work / name).replace(result / name)
    if out.exists():
        # of a run that was killed between these two renames
        _remove(work / "replaced")
        out.replace(work / "replaced")
    result.replace(out)
    shutil.rmtree(work)


def fingerprint(source: Path) -> list[list[Any]]:
    """Name, size and time of each file of the source: a changed model is another job."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(source.iterdir()) if p.is_file()]


def folder_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def need_space(needed: int, out: Path) -> None:
    """Raises UserError if `needed` bytes cannot be written beside `out`."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; choose another --out")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"no space left: {out} may need {needed:,} bytes, {free:,} are free; choose another --out")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all."""
    beside = path.with_suffix(".unfinished")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
