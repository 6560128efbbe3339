"""The target model in mid-generation: forwards over several tokens, and a cache taken back to what was accepted.

The only file that touches `GenerationMixin`'s inner methods (checked with transformers 5.17 and 5.23): they know how
each model prepares its inputs, so chunked prefill, cached prefixes and left padding work as in `generate`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.cache_utils import QuantizedLayer


class Target:
    """The cache holds every committed token but the last, which goes into the next forward.

    Args:
        rollback: the cache will be cropped after each forward; False needs no croppable cache.
    """

    # GenerationMixin has no annotations for what nn.Module does not know
    def __init__(self, model: Any, generation_config: GenerationConfig, model_kwargs: dict, rollback: bool):
        self.model = model
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.rollback = rollback
        self._before = 0

    @property
    def cache(self) -> Cache | None:
        return self.model_kwargs.get("past_key_values")

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, 1, vocab) after the prompt."""
        self._outputs = self.model._prefill(input_ids, self.generation_config, self.model_kwargs)
        self.model_kwargs = self._grown(1)
        return self._outputs.logits[:, -1:]

    def forward(self, input_ids: Tensor, draft: Tensor) -> Tensor:
        """Logits (batch, 1 + draft, vocab) after the last committed token and after each drafted one."""
        num_forward = 1 + draft.shape[1]
        model_kwargs = self._grown(draft.shape[1]) if draft.shape[1] else dict(self.model_kwargs)
        if "logits_to_keep" in model_kwargs:
            model_kwargs["logits_to_keep"] = num_forward
        inputs = self.model.prepare_inputs_for_generation(
            torch.cat([input_ids, draft], -1),
            # without a cache the whole sequence goes in again
            next_sequence_length=None if self.cache is None else num_forward,
            **model_kwargs,
        )
        self._before = _seq_length(self.cache)
        self._outputs = self.model(**inputs, return_dict=True)
        return self._outputs.logits[:, -num_forward:]

    def commit(self, num_new: int, num_draft: int) -> None:
        """Keep what the last forward computed for `num_new - 1` of its `num_draft` drafted tokens, forget the rest."""
        cache = self.cache
        if self.rollback and cache is not None:
            # crop(0) is not idle: while the past is recorded, only crop cuts a sliding window back to its size
            cache.crop(-(1 + num_draft - num_new))
            if _seq_length(cache) != self._before + num_new:
                raise RuntimeError(
                    f"{type(cache).__name__}.crop(-{1 + num_draft - num_new}) left {_seq_length(cache)} tokens where "
                    f"{self._before + num_new} were expected; hand in a cache whose crop undoes the last tokens, "
                    "such as transformers.DynamicCache(config=model.config)"
                )
        self.model_kwargs = self._grown(num_new)

    def _grown(self, num_new: int) -> dict:
        """The model's keyword arguments (mask, positions, token types) for `num_new` more tokens."""
        return self.model._update_model_kwargs_for_generation(
            self._outputs, dict(self.model_kwargs), num_new_tokens=num_new
        )


def _seq_length(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


@contextmanager
def recorded(cache: Cache | None) -> Iterator[None]:
    """Sliding-window and convolution layers keep what they would drop, so that `crop` can undo; as before on leaving.

    To be entered after the prefill: recording through it would keep the states of the whole prompt.

    Raises:
        ValueError: the cache cannot undo its last tokens.
    """
    _check_croppable(cache)
    assert cache is not None
    before = [(layer, getattr(layer, "record_past", None)) for layer in cache.layers]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, record_past in before:
            if record_past is not None:
                setattr(layer, "record_past", record_past)  # noqa: B010 (not every kind of layer has it)


def _check_croppable(cache: Cache | None) -> None:
    way_out = (
        "use cache_implementation='dynamic' or past_key_values=DynamicCache(config=model.config), "
        "or a recipe without a drafter (recipes.greedy())"
    )
    if cache is None:
        raise ValueError(f"speculation needs a cache to take back rejected tokens, and this run has none; {way_out}")
    # QuantizedLayer inherits crop and is_croppable = True, but crops its unquantised rest only
    stuck = [
        layer
        for layer in cache.layers
        if isinstance(layer, QuantizedLayer) or not layer.is_croppable or not hasattr(layer, "crop")
    ]
    if stuck:
        raise ValueError(
            f"{type(cache).__name__} cannot undo rejected tokens: {type(stuck[0]).__name__} "
            f"({len(stuck)} of {len(cache.layers)} layers) is not croppable; {way_out}"
        )
