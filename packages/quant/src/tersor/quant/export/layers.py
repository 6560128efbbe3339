"""The layers of a model that is exported, and what they must be for a format to hold them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tersor.quant.grid import Grid, IntGrid
from tersor.quant.linear import QuantizedLinear


class Unexportable(ValueError):
    """The format has no place for something that the model holds."""


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def unquantized(model: nn.Module) -> list[str]:
    """Names of the other linears, the output head among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def bare(
    name: str, layer: QuantizedLinear, of: str, axes: Iterable[str] = ("transform", "activation", "compensation")
) -> None:
    """Raises Unexportable if there is something on one of `axes` beside the grid of `layer`; `of` names the format."""
    for axis in axes:
        piece = getattr(layer.scheme, axis)
        if piece is not None:
            raise Unexportable(
                f"{name}: {of} has no place for the {axis} {piece}; save_pretrained keeps it, or quantise without it"
            )
    if layer.scheme.padding:
        raise Unexportable(
            f"{name}: {of} has no place for {layer.scheme.padding} zeros beside the inputs; save_pretrained keeps them, or "
            "quantise in groups that divide them"
        )


def integer_grid(name: str, grid: Grid, of: str) -> IntGrid:
    """`grid`, if its levels are scale * (integer - integer)."""
    if not isinstance(grid, IntGrid):
        raise Unexportable(f"{name}: {of} holds integers, not {grid}; quantise with IntGrid, or use save_pretrained")
    if grid.float_zero:
        raise Unexportable(
            f"{name}: {of} holds integer zero points, not those of {grid}; quantise with float_zero=False, or export to "
            f'"gguf" (at most 4 bits)'
        )
    return grid


def refuse_unless(fits: bool, name: str, of: str, wants: str, has: Any, way_out: str) -> None:
    """Raises Unexportable unless the layer `name` fits."""
    if not fits:
        raise Unexportable(f"{name}: {of} wants {wants}, got {has}; {way_out}")
