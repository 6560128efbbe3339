"""Quantisation of the weights of language models: `quantize(model, recipe, calibration)`.

Importing this package also registers its checkpoints with transformers: `from_pretrained` then loads them.
"""

from tersor.quant import recipes
from tersor.quant.checkpoint import register
from tersor.quant.quantize import quantize
from tersor.quant.recipe import Recipe

register()

__all__ = ["Recipe", "quantize", "recipes"]
