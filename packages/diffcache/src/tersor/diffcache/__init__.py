"""Feature caching for diffusion transformers: `with cached(transformer, recipe) as session:`."""

from tersor.diffcache import recipes
from tersor.diffcache.cached import cached
from tersor.diffcache.recipe import Recipe

__all__ = ["Recipe", "cached", "recipes"]
