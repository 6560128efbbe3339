"""What a decoder is made of: who drafts, who verifies, how long the drafts are."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tersor.decoding.controller import FixedLength
from tersor.decoding.speculate import SpeculativeOutput, decode


class Drafting(Protocol):
    """What a drafter has learnt about one batch while it is decoded."""

    def draft(self, input_ids: Tensor, num_draft: int) -> list[list[int]]:
        """At most `num_draft` guessed tokens for each row, after the committed `input_ids` (batch, seq) of this step.

        Called once per step with ever longer `input_ids`; an empty list means no guess.
        """
        ...


class Drafter(Protocol):
    needs_draft_model: ClassVar[bool]

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, draft_model: PreTrainedModel | None) -> Drafting:
        """Begin a batch: the prompt (batch, seq) and its mask, None when nothing is padded.

        `draft_model` is what the caller handed in, None unless `needs_draft_model`.
        """
        ...


class Verifier(Protocol):
    do_sample: ClassVar[bool]  # what the run must ask for, so that `generate` has prepared the fitting processors

    def verify(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next token (batch,) from the target's processed scores (batch, vocab).

        Called once per emitted position, in order; a draft stands as far as it says the same.
        """
        ...


class Controller(Protocol):
    def first(self) -> int:
        """Length of the first draft."""
        ...

    def next(self, num_draft: int, proposed: int, accepted: int) -> int:
        """Length of the next draft; the last one asked for `num_draft`, got `proposed` and kept `accepted`."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A decoder; call it through `speculate(model, inputs, recipe)` or `model.generate(..., custom_generate=recipe)`.

    Args:
        drafter: guesses the next tokens; None decodes one token at a time.
        verifier: None follows the run: `Greedy` when `do_sample=False`, `SampleMatch` when `do_sample=True`.
        controller: length of each draft.
    """

    drafter: Drafter | None = None
    verifier: Verifier | None = None
    controller: Controller = field(default_factory=FixedLength)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draft_model: PreTrainedModel | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> Tensor | SpeculativeOutput:
        """The `custom_generate` protocol: `generate` prepares processors, criteria and cache, and calls this.

        Returns token ids, or a `SpeculativeOutput` (with `.stats`) under `return_dict_in_generate=True`.
        """
        return decode(
            self,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            draft_model,
            generator,
            streamer,
            model_kwargs,
        )
