"""Axis solver: which of the grid's numbers a weight becomes."""

from tersor.quant.solver.beam_search import BeamSearch
from tersor.quant.solver.clip import ClipSearch
from tersor.quant.solver.coordinate_descent import CoordinateDescent
from tersor.quant.solver.dual_grain import DualGrainSearch
from tersor.quant.solver.gptq import GPTQ
from tersor.quant.solver.hqq import HQQ
from tersor.quant.solver.protocol import Solver
from tersor.quant.solver.result import Result, Split, relative_error
from tersor.quant.solver.rounding import LearnedRounding
from tersor.quant.solver.rtn import RTN
from tersor.quant.solver.spqr import SpQR
from tersor.quant.solver.weighted import WeightedRTN

__all__ = [
    "GPTQ",
    "HQQ",
    "RTN",
    "BeamSearch",
    "ClipSearch",
    "CoordinateDescent",
    "DualGrainSearch",
    "LearnedRounding",
    "Result",
    "Solver",
    "SpQR",
    "Split",
    "WeightedRTN",
    "relative_error",
]
