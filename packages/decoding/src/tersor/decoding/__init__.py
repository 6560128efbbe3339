"""Fast decoding: `speculate(model, inputs, recipe)`, or `model.generate(..., custom_generate=recipe)`."""

from tersor.decoding import recipes
from tersor.decoding.recipe import Recipe
from tersor.decoding.speculate import speculate

__all__ = ["Recipe", "recipes", "speculate"]
