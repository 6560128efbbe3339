"""Which examples an epoch leaves out."""

from tersor.datadistill.sampling.soft_prune import SoftPrune

__all__ = ["SoftPrune"]
