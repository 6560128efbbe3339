"""Published selections and samplers, as a choice of pieces."""

from tersor.datadistill.objective import Herding as _Herding
from tersor.datadistill.objective import RandomChoice as _RandomChoice
from tersor.datadistill.parametrisation import Subset as _Subset
from tersor.datadistill.recipe import Recipe as _Recipe
from tersor.datadistill.sampling import SoftPrune as _SoftPrune

__all__ = ["herding", "infobatch", "random"]


def random(per_class: int = 10) -> _Recipe:
    """Random selection (arXiv:2006.05929): real examples by lot, the same number of each class.

    The first row of that paper's tables and of every later one's: a method that does not beat it does nothing.
    """
    return _Recipe(objective=_RandomChoice(), parametrisation=_Subset(per_class))


def herding(per_class: int = 10, normalise: bool = False) -> _Recipe:
    """Herding (arXiv:1611.07725): real examples whose mean follows the mean of their class, chosen greedily.

    Args:
        normalise: bring features to length 1 first, as that paper does with those of a network; here they are pixels.
    """
    return _Recipe(objective=_Herding(normalise), parametrisation=_Subset(per_class))


def infobatch(r: float = 0.5, delta: float = 0.875, ema: float = 0.0) -> _Recipe:
    """InfoBatch (arXiv:2303.04947): each epoch skips a part of the well-learnt examples and reweights the rest of them.

    For `sample`. `SoftPrune` says where it differs from the paper's code.

    Args:
        r: share of the well-learnt examples (loss below the mean) that an epoch skips.
        delta: share of the epochs that skip; the last ones see everything.
        ema: memory of the losses, for strong augmentation; 0 takes the last loss, as the paper.
    """
    return _Recipe(sampling=_SoftPrune(r, delta, ema))
