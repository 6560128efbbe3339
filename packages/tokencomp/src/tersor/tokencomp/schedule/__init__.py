"""How many tokens go in which layer."""

from tersor.tokencomp.schedule.per_layer import PerLayer

__all__ = ["PerLayer"]
