"""Axis transform: what is done to weights, and to what meets them, so that they lose less when they are rounded."""

from tersor.quant.transform.awq import ActScale
from tersor.quant.transform.butterfly import Butterfly
from tersor.quant.transform.distribution_correction import DistributionCorrection
from tersor.quant.transform.learned_range import LearnedRange
from tersor.quant.transform.permute import PermuteIntermediate, PermuteResidual
from tersor.quant.transform.protocol import (
    BlockTransform,
    CalibratedTransform,
    ModelTransform,
    OnlineTransform,
    RangeTransform,
    SearchedTransform,
    TaughtTransform,
    UnsupportedFold,
)
from tersor.quant.transform.rotation import Hadamard, RotateHeads, RotateResidual
from tersor.quant.transform.smooth import PercentileSmooth, SearchedSmooth, Smooth

__all__ = [
    "ActScale",
    "BlockTransform",
    "Butterfly",
    "CalibratedTransform",
    "DistributionCorrection",
    "Hadamard",
    "LearnedRange",
    "ModelTransform",
    "OnlineTransform",
    "PercentileSmooth",
    "PermuteIntermediate",
    "PermuteResidual",
    "RangeTransform",
    "RotateHeads",
    "RotateResidual",
    "SearchedSmooth",
    "SearchedTransform",
    "Smooth",
    "TaughtTransform",
    "UnsupportedFold",
]
