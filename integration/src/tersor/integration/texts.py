"""Text to calibrate on and to measure with: what ships with tersor, a file, or a data set of the zoo."""

import hashlib
from pathlib import Path

from tersor.integration import zoo
from tersor.integration.errors import UserError, near_match

# of the zoo's data sets: the others hold pictures
_DATA_SETS = ("prose", "source-code")


def check(source: str | None) -> None:
    """Raises UserError if `calibration` and `held_out` would."""
    if source is None or source in _DATA_SETS or Path(source).is_file():
        return
    raise UserError(f"text file {source} does not exist, nor is it a data set{near_match(source, _DATA_SETS)}")


def identity(source: str | None) -> str | None:
    """What a job depends on: the SHA-256 of a file's bytes, the name of a data set, None for what ships."""
    if source is None or source in _DATA_SETS:
        return source
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


def calibration(source: str | None) -> str:
    """Text that models may learn from: by default what ships, otherwise a file or a data set's part for training."""
    return _read(source, "train") if source else zoo.calibration_text()


def held_out(source: str | None) -> str:
    """Text that models are judged by: by default what ships, otherwise a file or a data set's part for tests."""
    return _read(source, "test") if source else zoo.held_out_text()


def _read(source: str, split: str) -> str:
    check(source)
    if source not in _DATA_SETS:
        return Path(source).read_text()
    from tersor.integration.zoo import data

    return "\n".join(data.load(source, split)["text"])
