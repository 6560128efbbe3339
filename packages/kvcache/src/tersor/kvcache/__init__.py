"""KV-cache compression: `CompressedCache(config, recipe)`, a transformers `Cache` that stores fewer bytes per token."""

from tersor.kvcache import recipes
from tersor.kvcache.attention import packed_attention
from tersor.kvcache.cache import CompressedCache
from tersor.kvcache.recipe import Recipe

__all__ = ["CompressedCache", "Recipe", "packed_attention", "recipes"]
