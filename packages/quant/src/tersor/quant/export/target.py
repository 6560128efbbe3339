"""A target that appears whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(target: Path) -> None:
    """Raises FileNotFoundError or FileExistsError if something new cannot be put there; an empty directory is nothing."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory: create it first")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: choose another target, or delete it first")


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path next to `target` to write a file or directory to: renamed to it at the end, gone after an exception."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        if target.is_dir():
            # empty; a file would not replace it
            target.rmdir()
        os.rename(part, target)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        raise
