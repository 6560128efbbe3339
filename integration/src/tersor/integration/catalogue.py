"""What is installed: packages by entry point, and in each one its recipes, read from their own docstrings."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from tersor.integration.errors import UserError, near_match

# The order of the catalogue is the order of design.md; packages of others follow.
_HOUSE = ["quant", "kvcache", "decoding", "diffcache", "tokencomp", "datadistill", "lossless"]
_FIRST_LINE = re.compile(r"^(?P<title>.+?) \((?P<source>arXiv:[^)\s]+|https?://[^)\s]+)\): (?P<summary>.+?)\.?$")


@dataclass(frozen=True)
class Method:
    """One recipe of one package, as `tersor methods` lists it.

    Args:
        name: the recipe's function in `tersor.<package>.recipes`.
        source: arXiv id or URL.
        pieces: axis -> the piece that the recipe picks with its defaults.
    """

    package: str
    name: str
    title: str
    source: str
    summary: str
    pieces: dict[str, str]


def packages() -> list[str]:
    """Names of the installed packages of tersor."""
    found = {entry.name for entry in entry_points(group="tersor.packages")}
    return sorted(found, key=lambda name: (_HOUSE.index(name) if name in _HOUSE else len(_HOUSE), name))


def recipes(package: str) -> dict[str, Callable[..., Any]]:
    """Recipe functions of `package`, by name.

    Raises:
        UserError: no such package is installed.
    """
    if package not in packages():
        if package in _HOUSE:
            raise UserError(f"package {package!r} is not installed: pip install tersor-{package}")
        raise UserError(f"no package {package!r}{near_match(package, packages())}")
    module = importlib.import_module(f"tersor.{package}.recipes")
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    functions = {name: getattr(module, name) for name in names}
    return {name: f for name, f in functions.items() if inspect.isfunction(f) and _is_of(package, f)}


def recipe(package: str, name: str) -> Callable[..., Any]:
    """The recipe function `name` of `package`."""
    found = recipes(package)
    if name not in found:
        raise UserError(f"{package} has no recipe {name!r}{near_match(name, found)}")
    return found[name]


def methods(package: str | None = None) -> list[Method]:
    """All recipes of the installed packages, or of one."""
    chosen = packages() if package is None else [package]
    return [_method(p, name, function) for p in chosen for name, function in recipes(p).items()]


def _is_of(package: str, function: Callable[..., Any]) -> bool:
    return function.__module__.startswith(f"tersor.{package}.recipes")


def _method(package: str, name: str, function: Callable[..., Any]) -> Method:
    # a paragraph may break the first sentence over two lines
    first = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    match = _FIRST_LINE.match(first)
    if match is None:
        raise ValueError(
            f"tersor.{package}.recipes.{name}: the docstring must start 'Title (source): summary.', got {first!r}"
        )
    pieces = function()
    axes = {field.name: _piece(getattr(pieces, field.name)) for field in dataclasses.fields(pieces)}
    return Method(package, name, match["title"], match["source"], match["summary"], axes)


def _piece(value: Any) -> str:
    return str(value) if not isinstance(value, str) else value
