"""Published token compressions, as a choice of pieces."""

from tersor.tokencomp.matcher import Bipartite as _Bipartite
from tersor.tokencomp.recipe import Recipe as _Recipe
from tersor.tokencomp.reducer import Merge as _Merge
from tersor.tokencomp.reducer import Prune as _Prune
from tersor.tokencomp.schedule import PerLayer as _PerLayer
from tersor.tokencomp.scorer import KeyScorer as _KeyScorer
from tersor.tokencomp.scorer import RandomScorer as _RandomScorer

__all__ = ["random_pruning", "tome"]


def tome(r: int | tuple[int, ...] = 8, inflect: float = 0.0, proportional: bool = True) -> _Recipe:
    """ToMe (arXiv:2210.09461): merges the r most similar pairs of tokens in every layer, without training.

    Similar means: cosine of the attention keys, averaged over heads. `Bipartite`, `Merge` and `PerLayer` say where they
    differ from the authors' code.

    Args:
        r: tokens removed per layer, or one number for each layer.
        inflect: -1 removes most in the first layers, 1 in the last ones, 0 the same in each.
        proportional: False for self-supervised MAE weights as they come (the paper's finding); True for all others.
    """
    return _Recipe(_KeyScorer(), _Merge(_Bipartite(), proportional), _PerLayer(r, inflect))


def random_pruning(r: int | tuple[int, ...] = 8, seed: int = 0) -> _Recipe:
    """Random pruning (arXiv:2507.20198): drops r tokens of every layer by lot, the baseline that a method must beat.

    The survey counts it among the strong baselines; every comparison should print it.

    Args:
        r: tokens removed per layer, or one number for each layer.
        seed: of the lot; the same seed drops the same places in every forward.
    """
    return _Recipe(_RandomScorer(seed=seed), _Prune(), _PerLayer(r))
