"""Small trained models that ship with tersor, and texts to measure with. Loading needs no package but transformers."""

import hashlib
from pathlib import Path

from tersor.integration.errors import UserError, near_match

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the models."""
    return sorted(folder.name.replace("_", "-") for folder in _HERE.iterdir() if (folder / "config.json").is_file())


def path(name: str) -> Path:
    """The directory of model `name`, for `from_pretrained`.

    Raises:
        UserError: no such model, or its files are not what was shipped.
    """
    if name not in names():
        raise UserError(f"no model {name!r} in the zoo{near_match(name, names())}")
    folder = _HERE / name.replace("-", "_")
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Compare the files of `folder` with its SHA256SUMS.

    Raises:
        UserError: a file is missing or has changed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, file = line.split()
        content = (folder / file).read_bytes() if (folder / file).is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            raise UserError(f"{folder / file} is damaged or missing; reinstall tersor")
