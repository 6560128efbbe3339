"""CompressedCache(config, recipe): what `generate` takes as `past_key_values`."""

from typing import NamedTuple

from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from tersor.kvcache.layer import CompressedLayer, SlidingLayer, StoredLayer
from tersor.kvcache.recipe import Recipe

FULL = "full_attention"
SLIDING = ("sliding_attention", "chunked_attention")  # the same for a cache, only their masks differ


class UnsupportedModel(NotImplementedError):
    """The model has layers that the cache does not know how to store."""


class CacheStats(NamedTuple):
    seq_length: int
    encoded_keys: int  # tokens whose keys are read from codes, in each full-attention layer
    encoded_values: int
    nbytes: int
    dense_nbytes: int  # what transformers.DynamicCache would hold for the same tokens


class CompressedCache(Cache):
    """A transformers `Cache` whose full-attention layers store keys and values as `recipe` says.

    Sliding-window and chunked-attention layers hold few bytes and keep them as they are. Attention gets dense tensors:
    those of one layer at a time are decoded in `update` and not held, so what is saved is memory between the layers'
    turns, at the price of decoding the whole layer in each step. Inside `packed_attention` it reads the codes instead.

    Works with anything that takes a `Cache`: greedy, sampling, beam search, assisted and prompt-lookup decoding,
    batches with left padding (`PerChannel` says what padding does to codes).

    Args:
        config: the model's config: `model.config` itself, which tells which attention the model has.
        recipe: as from `recipes`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tersor.kvcache import CompressedCache, recipes
    >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = CompressedCache(config, recipes.kivi(bits=4, residual_length=32))
    >>> ids = model.generate(torch.arange(200)[None] % 64, past_key_values=cache, min_new_tokens=8, max_new_tokens=8)
    >>> cache.get_seq_length(), cache.stats.encoded_keys, cache.stats.encoded_values
    (207, 192, 175)
    >>> cache.nbytes < 0.4 * cache.stats.dense_nbytes
    True

    Raises:
        UnsupportedModel: the model has other layers (linear attention, shared caches, cross-attention), or none to
            compress.
        ValueError: the recipe's groups do not fit the model's heads.
    """

    layers: list[StoredLayer]

    def __init__(self, config: PreTrainedConfig, recipe: Recipe):
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe such as recipes.kivi(), got {recipe!r}")
        self.recipe = recipe
        super().__init__(layers=[*_layers(config, recipe)])

    def __repr__(self) -> str:
        return f"CompressedCache({self.recipe}, {len(self.layers)} layers, {self.get_seq_length()} tokens)"

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: codes, scales, minima, full-precision tokens and the copies kept for `crop`."""
        return _nbytes([t for layer in self.layers for t in layer.tensors()])

    @property
    def stats(self) -> CacheStats:
        streams = next((layer.streams for layer in self.layers if isinstance(layer, CompressedLayer)), None)
        keys, values = (stream.encoded for stream in streams) if streams else (0, 0)
        dense_nbytes = sum(layer.dense_nbytes() for layer in self.layers)
        return CacheStats(self.get_seq_length(), keys, values, self.nbytes, dense_nbytes)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens; a positive number is how many stay, as in older transformers.

        Exact, as if the tokens had never come, for the last `recipe.undo` tokens, and for all since the last crop once
        `activate_past_recording` was called. Deeper, tokens in full-attention layers that are stored only as codes stay
        codes and decode as before, where the window would have held them in full precision.

        Raises:
            ValueError: a sliding-window layer no longer holds the tokens that it would see again. Nothing is changed.
        """
        length = self.get_seq_length()
        num_tokens = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, length)
        for index, layer in enumerate(self.layers):
            if num_tokens > layer.undoable:
                raise ValueError(
                    f"layer {index} ({type(layer).__name__}) can take back {layer.undoable} tokens, not {num_tokens}: "
                    f"use a recipe with undo={num_tokens} or more, or call activate_past_recording() before they come"
                )
        for layer in self.layers:
            layer.crop(-num_tokens)


def _layers(config: PreTrainedConfig, recipe: Recipe) -> list[StoredLayer]:
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name}: encoder-decoder models are not supported; use transformers.EncoderDecoderCache"
        )
    decoder = config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(decoder)
    if isinstance(kwargs, dict):  # transformers 5.17: one for all layers
        kwargs = [kwargs] * len(types)
    # layers that read another layer's cache: "dummy", in transformers 5.17 left out
    types = types + ["dummy"] * (decoder.num_hidden_layers - len(types))
    way_out = "use transformers.DynamicCache(config=config)"
    unsupported = sorted(set(types) - {FULL, *SLIDING})
    if unsupported:
        count = sum(type_ in unsupported for type_ in types)
        raise UnsupportedModel(
            f"{name}: layers of type {', '.join(unsupported)} ({count} of {len(types)}) are not supported, only "
            f"{', '.join((FULL, *SLIDING))}; {way_out}"
        )
    if FULL not in types and not (recipe.key_codec.lossless and recipe.value_codec.lossless):
        raise UnsupportedModel(
            f"{name}: none of its {len(types)} layers is of type {FULL}, so there is nothing to compress: "
            f"sliding windows are kept as they are; {way_out}"
        )
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    recipe.check(getattr(decoder, "qk_head_dim", None) or head_dim, getattr(decoder, "v_head_dim", None) or head_dim)
    return [
        CompressedLayer(recipe, decoder) if type_ == FULL else SlidingLayer(kwarg["sliding_window"], recipe.undo)
        for type_, kwarg in zip(types, kwargs)
    ]


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`: a view counts all that it keeps alive, a shared storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
