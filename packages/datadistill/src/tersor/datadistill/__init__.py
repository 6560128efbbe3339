"""Smaller training sets: `distill(dataset, recipe)` once, or `sample(dataset, recipe, ...)` while training."""

from tersor.datadistill import recipes
from tersor.datadistill.distill import distill
from tersor.datadistill.recipe import Recipe
from tersor.datadistill.sample import sample

__all__ = ["Recipe", "distill", "recipes", "sample"]
