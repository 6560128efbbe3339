"""Which token is merged into which: a piece of `Merge`."""

from tersor.tokencomp.matcher.assignment import Assignment, Matcher
from tersor.tokencomp.matcher.bipartite import Bipartite

__all__ = ["Assignment", "Bipartite", "Matcher"]
