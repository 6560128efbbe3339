"""tersor.lossless: checkpoints made smaller without changing a bit.

`pack(source, target, recipe)` and `unpack(source, target)`; `open_packed(path)` reads single tensors.
"""

from . import recipes
from .container.packed import Packed as open_packed
from .pack import pack
from .recipe import Recipe
from .unpack import unpack

__all__ = ["Recipe", "open_packed", "pack", "recipes", "unpack"]
