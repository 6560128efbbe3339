"""Axis tuning: what is learnt by gradients once layers are quantised."""

from tersor.quant.tuning.block_mse import BlockMSE
from tersor.quant.tuning.block_reconstruction import BlockReconstruction
from tersor.quant.tuning.block_scales import BlockScales
from tersor.quant.tuning.deviation_aware import DeviationAware
from tersor.quant.tuning.learned_step import LearnedClip, LearnedStep
from tersor.quant.tuning.protocol import BlockTuning, ModelTuning
from tersor.quant.tuning.pv import PV
from tersor.quant.tuning.restorative import RestorativePreprocess
from tersor.quant.tuning.straight_through import StraightThrough
from tersor.quant.tuning.trainable import TrainableLinear, trainable

__all__ = [
    "PV",
    "BlockMSE",
    "BlockReconstruction",
    "BlockScales",
    "BlockTuning",
    "DeviationAware",
    "LearnedClip",
    "LearnedStep",
    "ModelTuning",
    "RestorativePreprocess",
    "StraightThrough",
    "TrainableLinear",
    "trainable",
]
