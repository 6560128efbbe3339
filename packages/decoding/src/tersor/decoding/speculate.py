"""Draft, verify in one forward, keep what agrees: same tokens, fewer passes of the target model."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from tersor.decoding.rows import Rows
from tersor.decoding.stats import Pass, Stats
from tersor.decoding.target import Target, recorded
from tersor.decoding.verifier import Greedy, SampleMatch

if TYPE_CHECKING:
    from tersor.decoding.recipe import Recipe


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns under `return_dict_in_generate=True` (`.sequences`, `.past_key_values`), and `.stats`."""

    stats: Stats = None  # type: ignore[assignment]  # ModelOutput demands the default None


def speculate(
    model: PreTrainedModel,
    inputs: Tensor | Mapping[str, Tensor],
    recipe: "Recipe",
    *,
    draft_model: PreTrainedModel | None = None,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    **settings,
) -> SpeculativeOutput:
    """The tokens of `model.generate(**inputs, **settings)`, in fewer forward passes of the model.

    Identical to plain decoding under the same kind of cache: each token is the target's own choice (its argmax, or its
    draw when `do_sample=True`) from scores that depend on the same prefix, after the same logits processors. The scores
    are computed for several positions at once, which may round differently; a token can only differ where the best two
    scores are closer than that rounding: in float32 and float64 practically never, in bfloat16 sometimes.

    A batch moves in lockstep, as far as its least lucky row; so small batches gain, large ones do not.

    Args:
        inputs: token ids (batch, seq) or what a tokenizer returns; a batch is padded on the left.
        recipe: what `recipes` offers, or pieces of your own.
        draft_model: a smaller model with the same tokens, for recipes that draft with one.
        streamer: gets the prompt, then every token. (`generate` itself drops it when it calls a custom decoder.)
        generator: source of the draws when `do_sample=True`, on the device of `input_ids`; None means torch's default
            one. The same seed gives the same tokens as `generate(do_sample=True)`.
        settings: whatever `generate` takes: `max_new_tokens`, `past_key_values`, `repetition_penalty`, ...

    Warns:
        UserWarning: no drafted token was accepted, so the drafter was of no use.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tersor.decoding import recipes, speculate
    >>> _ = torch.manual_seed(0)
    >>> config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, eos_token_id=None)
    >>> model, prompt = LlamaForCausalLM(config), torch.tensor([[1, 2, 3, 4]])
    >>> out = speculate(model, prompt, recipes.prompt_lookup(), max_new_tokens=40)
    >>> torch.equal(out.sequences, model.generate(prompt, do_sample=False, max_new_tokens=40))
    True
    >>> out.stats.tokens, out.stats.target_passes < 40
    (40, True)
    """
    if not isinstance(inputs, Mapping):
        inputs = {"input_ids": inputs}
    return model.generate(  # type: ignore[return-value]
        **inputs,
        **settings,
        return_dict_in_generate=True,
        custom_generate=partial(recipe, streamer=streamer),
        streamer=streamer,
        draft_model=draft_model,
        generator=generator,
    )


def decode(
    recipe: "Recipe",
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_model: PreTrainedModel | None,
    generator: torch.Generator | None,
    streamer: BaseStreamer | None,
    model_kwargs: dict,
) -> Tensor | SpeculativeOutput:
    """The decoding loop, on what `generate` has prepared.

    The walk over a verified draft is the plain loop itself: position by position, processors see the prefix that they
    would see, stopping criteria are asked after each token, and nothing is asked beyond the last token. So stateful
    processors and draws behave as in plain decoding; only the logits come from fewer forwards.
    """
    _check_mode(recipe, model, generation_config)
    _check_draft_model(recipe, model, draft_model)
    verifier = recipe.verifier or (SampleMatch() if generation_config.do_sample else Greedy())
    choose = partial(verifier.verify, generator=generator)
    rows = Rows(input_ids, choose, logits_processor, stopping_criteria, generation_config, streamer)
    drafting = None
    if recipe.drafter is not None:
        drafting = recipe.drafter.start(input_ids, _prompt_mask(input_ids, model_kwargs), draft_model)
    target = Target(model, generation_config, model_kwargs, rollback=drafting is not None)

    rows.append(target.prefill(input_ids)[:, 0])
    passes = [Pass(0, 0)]
    num_draft = recipe.controller.first()
    with recorded(target.cache) if drafting else nullcontext():
        while not rows.finished:
            # the pass gives one token of its own
            room = num_draft if rows.room is None else min(num_draft, rows.room - 1)
            draft = rows.align(drafting.draft(rows.input_ids, room) if drafting and room > 0 else [[]] * len(input_ids))
            proposed = draft.shape[1]
            logits = target.forward(rows.input_ids, draft)
            accepted = 0
            tokens = rows.append(logits[:, 0])
            while accepted < proposed and not rows.finished and _agree(tokens, draft[:, accepted], rows.live):
                accepted += 1
                tokens = rows.append(logits[:, accepted])
            target.commit(1 + accepted, proposed)
            passes.append(Pass(proposed, accepted))
            if proposed:
                num_draft = recipe.controller.next(num_draft, proposed, accepted)

    if streamer is not None:
        streamer.end()
    stats = Stats(tuple(passes))
    if drafting and not stats.accepted and stats.tokens > 2:
        # no numbers in the text, so that Python shows it once and not for each prompt
        warnings.warn(
            f"{recipe.drafter} had no drafted token accepted in this run (see .stats); speculation saves nothing here",
            stacklevel=3,
        )
    if not generation_config.return_dict_in_generate:
        return rows.input_ids
    return SpeculativeOutput(
        sequences=rows.input_ids,  # type: ignore[arg-type]
        scores=rows.scores,  # type: ignore[arg-type]
        logits=rows.logits,  # type: ignore[arg-type]
        past_key_values=target.cache,
        stats=stats,
    )


def _agree(tokens: Tensor, drafted: Tensor, live: Tensor) -> bool:
    return torch.equal(tokens[live], drafted[live])


def _prompt_mask(input_ids: Tensor, model_kwargs: dict) -> Tensor | None:
    """The mask's columns of `input_ids`: it is longer when a cache already holds the beginning."""
    mask = model_kwargs.get("attention_mask")
    return None if mask is None else mask[:, mask.shape[1] - input_ids.shape[1] :]


def _check_mode(recipe: "Recipe", model: PreTrainedModel, generation_config: GenerationConfig) -> None:
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder; speculate decodes decoder-only models: use model.generate"
        )
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(
            f"the settings ask for {mode.value}, speculate does greedy_search and sample: "
            "leave out num_beams, penalty_alpha, dola_layers, prompt_lookup_num_tokens and assistant_model"
        )
    if generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        raise NotImplementedError(
            "output_attentions and output_hidden_states are not kept by speculate; "
            "run the model once over .sequences to get them"
        )
    if recipe.verifier is not None and recipe.verifier.do_sample is not bool(generation_config.do_sample):
        raise ValueError(
            f"{recipe.verifier} needs do_sample={recipe.verifier.do_sample}, but the run (or the model's "
            f"generation_config) has do_sample={generation_config.do_sample}; "
            f"pass do_sample={recipe.verifier.do_sample}, or use verifier=None to follow the run"
        )


def _check_draft_model(recipe: "Recipe", model: PreTrainedModel, draft_model: PreTrainedModel | None) -> None:
    needed = recipe.drafter is not None and recipe.drafter.needs_draft_model
    if needed is not (draft_model is not None):
        raise ValueError(
            f"{recipe.drafter} needs a draft model: pass draft_model=..."
            if needed
            else f"draft_model is given, but the recipe's drafter {recipe.drafter} uses none; "
            "leave it out, or use recipes.speculative_decoding()"
        )
    if draft_model is not None:
        sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (draft_model, model)]
        if sizes[0] > sizes[1]:
            raise ValueError(
                f"the draft model knows {sizes[0]} tokens, the target {sizes[1]}: it would draft unknown ones; "
                "use a draft model with the target's tokenizer"
            )
