"""What happens to the tokens that go."""

from tersor.tokencomp.reducer.merge import Merge
from tersor.tokencomp.reducer.prune import Prune

__all__ = ["Merge", "Prune"]
