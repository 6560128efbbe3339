"""Where in a model tokens are reduced: one file per library, all giving a `Tower`."""

from tersor.tokencomp.site.find import SUPPORTED, find_tower
from tersor.tokencomp.site.tower import Layer, Tower

__all__ = ["SUPPORTED", "Layer", "Tower", "find_tower"]
