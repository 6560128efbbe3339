"""Converted copies of the data, one Arrow file each under the user's cache directory, whose name holds its checksum."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features

# goes up when a conversion changes, so that older copies are no longer found
VERSION = 1


def directory() -> Path:
    """What tersor keeps for the user: $XDG_CACHE_HOME/tersor."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor"


def library() -> Any:
    """The module `datasets`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("the zoo's data needs the library datasets: pip install 'tersor[data]'") from error
    return datasets


def cached(name: str, features: "Features", rows: Callable[[], Iterable[dict[str, Any]]]) -> "Dataset":
    """The copy called `name`, memory-mapped; made of `rows()` if there is none yet or it is damaged.

    Raises:
        UserError: the cache directory cannot be written, or what `rows` raises.
    """
    folder = directory() / f"data-{VERSION}"
    for file in folder.glob(f"{name}.*.arrow"):
        if file.name == _name(name, file):
            return library().Dataset.from_file(str(file))
        file.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    os.close(descriptor)
    beside = Path(path)
    try:
        _write(beside, features, rows())
        return library().Dataset.from_file(str(beside.replace(folder / _name(name, beside))))
    finally:
        beside.unlink(missing_ok=True)


def _write(path: Path, features: "Features", rows: Iterable[dict[str, Any]]) -> None:
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            encoded: Any = features.encode_example(row)
            writer.write(encoded)
        writer.finalize()


def _name(name: str, file: Path) -> str:
    with file.open("rb") as content:
        return f"{name}.{hashlib.file_digest(content, 'sha256').hexdigest()}.arrow"
