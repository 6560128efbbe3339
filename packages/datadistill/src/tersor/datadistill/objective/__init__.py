"""What the small set must match."""

from tersor.datadistill.objective.herding import Herding
from tersor.datadistill.objective.lot import RandomChoice

__all__ = ["Herding", "RandomChoice"]
