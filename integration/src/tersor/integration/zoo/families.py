"""Which file trains and measures which model: `training/FAMILY.py` and `measure/FAMILY.py`."""

import importlib
from typing import TYPE_CHECKING, Any

from tersor.integration import zoo
from tersor.integration.errors import UserError, near_match

if TYPE_CHECKING:
    from tersor.integration.zoo.measure import Figure

FAMILIES = {
    "tiny-lm": "language",
    "tiny-draft": "language",
    "tiny-moe": "language",
    "tiny-vit": "images",
    "tiny-cnn": "images",
    "tiny-dit": "dit",
    "tiny-dit-eps": "dit",
    "tiny-dit-video": "dit",
    "tiny-dlm": "dlm",
    "tiny-vlm": "vlm",
}


def training(name: str) -> Any:
    """The module that trains model `name`: it has `TRAININGS` and `train(training, folder, progress, seed)`.

    Raises:
        UserError: no such model.
    """
    return importlib.import_module(f"{__package__}.training.{_family(name)}")


def figures(name: str) -> "list[Figure]":
    """Measures the shipped model `name`.

    Raises:
        UserError: no such model, or the data it is measured on is missing.
        OSError: its files are damaged.
    """
    return importlib.import_module(f"{__package__}.measure.{_family(name)}").figures(name, *zoo.load(name))


def _family(name: str) -> str:
    if name not in FAMILIES:
        raise UserError(f"no model {name!r} in the zoo{near_match(name, FAMILIES)}")
    return FAMILIES[name]
