"""Axis grid: the numbers that a weight may become."""

from tersor.quant.grid.additive import AdditiveGrid, AdditiveParams
from tersor.quant.grid.balanced import BitBalance
from tersor.quant.grid.bilevel import BilevelInt, BilevelParams
from tersor.quant.grid.binary import BinaryGrid, BinaryParams
from tersor.quant.grid.bipolar import BipolarInt
from tersor.quant.grid.codebook import CodebookGrid, ScaleParams
from tersor.quant.grid.dual_binary import DualBinary, DualBinaryParams
from tersor.quant.grid.dual_grain import DualGrain, DualGrainParams
from tersor.quant.grid.float import FloatGrid
from tersor.quant.grid.gaussian import GaussianGrid, GaussianPairGrid
from tersor.quant.grid.integer import IntGrid, IntParams
from tersor.quant.grid.kmeans import KMeansGrid, KMeansParams
from tersor.quant.grid.masked_binary import MaskedBinary, MaskedBinaryParams
from tersor.quant.grid.microscaling import MXFP4Grid, NVFP4Grid, NVFP4Params
from tersor.quant.grid.normal import DoubleNormalFloatGrid, DoubleParams, NormalFloatGrid
from tersor.quant.grid.protocol import Buffer, Grid, IntegerGrid, ScalarGrid, bits_per_weight, of_groups
from tersor.quant.grid.seed import SeedGrid, SeedParams
from tersor.quant.grid.sign_low_rank import SignLowRankParams, SignLowRankStack

__all__ = [
    "AdditiveGrid",
    "AdditiveParams",
    "BilevelInt",
    "BilevelParams",
    "BinaryGrid",
    "BinaryParams",
    "BipolarInt",
    "BitBalance",
    "Buffer",
    "CodebookGrid",
    "DoubleNormalFloatGrid",
    "DoubleParams",
    "DualBinary",
    "DualBinaryParams",
    "DualGrain",
    "DualGrainParams",
    "FloatGrid",
    "GaussianGrid",
    "GaussianPairGrid",
    "Grid",
    "IntGrid",
    "IntParams",
    "IntegerGrid",
    "KMeansGrid",
    "KMeansParams",
    "MXFP4Grid",
    "MaskedBinary",
    "MaskedBinaryParams",
    "NVFP4Grid",
    "NVFP4Params",
    "NormalFloatGrid",
    "ScalarGrid",
    "ScaleParams",
    "SeedGrid",
    "SeedParams",
    "SignLowRankParams",
    "SignLowRankStack",
    "bits_per_weight",
    "of_groups",
]
