"""Published caches, as a choice of pieces."""

from tersor.kvcache.codec import PerChannel as _PerChannel
from tersor.kvcache.codec import PerToken as _PerToken
from tersor.kvcache.recipe import Recipe as _Recipe
from tersor.kvcache.window import FlushedWindow as _FlushedWindow
from tersor.kvcache.window import RecentWindow as _RecentWindow

__all__ = ["full", "kivi"]


def full() -> _Recipe:
    """Full precision (https://huggingface.co/docs/transformers/kv_cache): keys and values as they are.

    The baseline that the others are compared with; attention sees the same bits as with `transformers.DynamicCache`.
    """
    return _Recipe(undo=0)


def kivi(bits: int = 4, group_size: int = 32, residual_length: int = 128, value_bits: int | None = None) -> _Recipe:
    """KIVI (arXiv:2402.02750): keys quantised per channel, values per token, recent tokens in full precision.

    As in the authors' code (https://github.com/jy-yuan/KIVI): the prompt attends to itself in full precision; the key
    window is flushed whole when it is full, the value window slides. The paper goes down to 2 bits.

    Args:
        bits: bits per code of keys, and of values unless `value_bits` is given.
        group_size: tokens (keys) or channels (values) that share a scale; must divide head_dim.
        residual_length: tokens of the windows; a multiple of group_size.
        value_bits: bits per code of values.
    """
    return _Recipe(
        key_codec=_PerChannel(bits, group_size),
        value_codec=_PerToken(bits if value_bits is None else value_bits, group_size),
        key_window=_FlushedWindow(residual_length),
        value_window=_RecentWindow(residual_length),
    )
