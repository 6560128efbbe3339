"""How tokens are stored once they leave the window."""

from tersor.kvcache.codec.affine import PerChannel, PerToken
from tersor.kvcache.codec.full import FullPrecision

__all__ = ["FullPrecision", "PerChannel", "PerToken"]
