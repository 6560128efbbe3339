"""Token compression: `slim(model, recipe)` makes a vision transformer work on fewer tokens."""

from tersor.tokencomp import recipes
from tersor.tokencomp.recipe import Recipe
from tersor.tokencomp.slim import slim

__all__ = ["Recipe", "recipes", "slim"]
