"""Axis grid: the numbers that a weight may become."""

from tersor.quant.grid.integer import IntGrid, IntParams

__all__ = ["IntGrid", "IntParams"]
