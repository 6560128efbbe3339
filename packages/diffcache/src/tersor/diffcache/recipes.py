"""Published feature caches, each a choice of pieces."""

from tersor.diffcache.granularity import SubModules
from tersor.diffcache.predictor import Reuse
from tersor.diffcache.recipe import Recipe
from tersor.diffcache.trigger import Interval

__all__ = ["fora"]


def fora(interval: int = 3) -> Recipe:
    """FORA (arXiv:2407.01425): attention and MLP outputs are computed every `interval` steps and reused between.

    The outputs are kept before the adaLN gate, so that the current step's gate multiplies them. The paper uses 3 for
    DiT-XL/2; `interval=1` computes every step.
    """
    return Recipe(granularity=SubModules(), predictor=Reuse(), trigger=Interval(interval))
