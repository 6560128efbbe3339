"""Axis compensation: what is stored beside a quantised weight to make up for its error."""

from tersor.quant.compensation.low_rank import LowRank
from tersor.quant.compensation.protocol import Compensation
from tersor.quant.compensation.sparse import SparseOutliers

__all__ = ["Compensation", "LowRank", "SparseOutliers"]
