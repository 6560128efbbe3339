"""Axis allocation: which grid each layer gets, for a budget that all share."""

from tersor.quant.allocation.divergence import LayerDivergence
from tersor.quant.allocation.dynamic_program import DynamicProgram
from tersor.quant.allocation.error import OutputError, RelativeError
from tersor.quant.allocation.evolution import Evolution
from tersor.quant.allocation.files import load, save
from tersor.quant.allocation.greedy import Greedy
from tersor.quant.allocation.integer_program import IntegerProgram
from tersor.quant.allocation.linearity import Linearity
from tersor.quant.allocation.mask_sensitivity import MaskSensitivity
from tersor.quant.allocation.measured_cost import MeasuredCost
from tersor.quant.allocation.mixed_grids import MixedGrids
from tersor.quant.allocation.problem import Problem
from tersor.quant.allocation.protocol import Allocator, Cost, Loss
from tersor.quant.allocation.stack_order import StackOrder
from tersor.quant.allocation.stored_bits import StoredBits

__all__ = [
    "Allocator",
    "Cost",
    "DynamicProgram",
    "Evolution",
    "Greedy",
    "IntegerProgram",
    "LayerDivergence",
    "Linearity",
    "Loss",
    "MaskSensitivity",
    "MeasuredCost",
    "MixedGrids",
    "OutputError",
    "Problem",
    "RelativeError",
    "StackOrder",
    "StoredBits",
    "load",
    "save",
]
