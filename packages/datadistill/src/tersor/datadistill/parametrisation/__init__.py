"""What is stored of the small set."""

from tersor.datadistill.parametrisation.subset import Subset

__all__ = ["Subset"]
