"""What is looked at."""

from tersor.tokencomp.scorer.keys import KeyScorer
from tersor.tokencomp.scorer.lot import RandomScorer

__all__ = ["KeyScorer", "RandomScorer"]
