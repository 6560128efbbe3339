"""Allocations as JSON: layer by layer, for people to read and change."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from tersor.quant.grid import Grid
from tersor.quant.scheme import Scheme


def save(allocation: Mapping[str, Grid], path: str | PathLike[str]) -> None:
    """Write {layer: {"type": the grid's class, and its fields}}."""
    layers = {name: Scheme(grid).to_dict()["grid"] for name, grid in allocation.items()}
    Path(path).write_text(json.dumps(layers, indent=2) + "\n")


def load(path: str | PathLike[str]) -> dict[str, Grid]:
    """What `save` wrote.

    Raises:
        ValueError: a layer's grid is none of this tersor.quant.
    """
    allocation = {}
    for name, settings in json.loads(Path(path).read_text()).items():
        try:
            allocation[name] = Scheme.from_dict({"grid": settings}).grid
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: {name} has {settings}, which this tersor.quant does not have: pip install -U tersor-quant"
            ) from error
    return allocation
