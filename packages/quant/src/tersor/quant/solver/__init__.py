"""Axis solver: which of the grid's numbers a weight becomes."""

from tersor.quant.solver.gptq import GPTQ
from tersor.quant.solver.result import Result, relative_error
from tersor.quant.solver.rtn import RTN

__all__ = ["GPTQ", "RTN", "Result", "relative_error"]
