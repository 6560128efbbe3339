"""Published quantisers, as a choice of pieces."""

from dataclasses import replace as _replace
from typing import Literal as _Literal

from tersor.quant.grid import IntGrid as _IntGrid
from tersor.quant.recipe import Recipe as _Recipe
from tersor.quant.solver import GPTQ as _GPTQ
from tersor.quant.solver import RTN as _RTN

__all__ = ["gptq", "rtn"]


def rtn(bits: int = 4, group_size: int | None = 64, symmetric: bool = False) -> _Recipe:
    """Round to nearest (arXiv:1712.05877): integer weights without calibration data; every other solver must beat it."""
    return _Recipe(grid=_IntGrid(bits, group_size, symmetric), solver=_RTN())


def gptq(
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    order: _Literal["act", "none", "group"] = "act",
    damp: float = 0.01,
) -> _Recipe:
    """GPTQ (arXiv:2210.17323): rounds column by column and lets later columns make up for the errors of earlier ones.

    Adds the solver `GPTQ`; the grid is that of `rtn`. `order="none"` is the paper's algorithm 1; rounding the columns
    with the largest inputs first, as the authors' code can, loses less on every model tried.
    """
    return _replace(rtn(bits, group_size, symmetric), solver=_GPTQ(damp, order))
