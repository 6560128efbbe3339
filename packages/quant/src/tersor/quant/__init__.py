"""Quantisation of the weights of language models: `quantize(model, recipe, calibration)`.

`quantize_checkpoint` does the same from file to file, a block in memory at a time; `export` writes for other engines.

Importing this package also registers its checkpoints with transformers: `from_pretrained` then loads them.
"""

from tersor.quant import recipes
from tersor.quant.checkpoint import register
from tersor.quant.export import export
from tersor.quant.quantize import quantize
from tersor.quant.recipe import Recipe
from tersor.quant.stream import quantize_checkpoint

register()

__all__ = ["Recipe", "export", "quantize", "quantize_checkpoint", "recipes"]
