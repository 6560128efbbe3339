"""Axis activation: how a layer's input is rounded at run time."""

from tersor.quant.activation.bipolar import BipolarActivation
from tersor.quant.activation.block_mixed import BlockMixedActivation
from tersor.quant.activation.integer import IntActivation
from tersor.quant.activation.planes import PlaneActivation
from tersor.quant.activation.protocol import Activation, CalibratedActivation
from tersor.quant.activation.static import StaticActivation

__all__ = [
    "Activation",
    "BipolarActivation",
    "BlockMixedActivation",
    "CalibratedActivation",
    "IntActivation",
    "PlaneActivation",
    "StaticActivation",
]
