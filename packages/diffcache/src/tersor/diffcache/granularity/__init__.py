"""Granularities: which modules are replaced, and what of them is kept."""

from tersor.diffcache.granularity.blocks import Blocks
from tersor.diffcache.granularity.sub_modules import SubModules

__all__ = ["Blocks", "SubModules"]
