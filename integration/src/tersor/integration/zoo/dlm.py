"""A masked diffusion language model: Llama's blocks, every token seeing every other; its loss and its sampler.

This file imports torch and transformers alone, so that it can be loaded from its path, without tersor.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MaskedDiffusionConfig(LlamaConfig):
    """Args:
    mask_token_id: stands for a token that is not known yet; never predicted.
    is_causal: False, by which transformers' masks let every token see every other.
    """

    model_type = "zoo_masked_diffusion"

    mask_token_id: int = 4096
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id must be 0 to {self.vocab_size - 1}, got {self.mask_token_id}")


class MaskedDiffusionLlama(LlamaPreTrainedModel):
    """LLaDA (arXiv:2502.09992): predicts all masked tokens at once, each from all that is not masked.

    An answer shorter than its room is filled up with `eos_token_id`, which is predicted like any other token.
    """

    config_class = MaskedDiffusionConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token at each place itself (not of the next one), (batch, seq, vocab).

        Args:
            attention_mask: (batch, seq), 0 at padding; or (batch, 1, seq, seq), True where a query sees a key.
            past_key_values: keys and values of other tokens, which the tokens here see as well; theirs are added.
            kwargs: `inputs_embeds`, `use_cache` and others that `LlamaModel` takes.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def choose_masked(answers: Tensor, generator: torch.Generator) -> Tensor:
    """For each row the places to mask: n of the L places of its answer, n uniform in 1 ... L, all sets as likely.

    Args:
        answers: (batch, seq), True where an answer stands.
    """
    length = answers.sum(-1)
    n = 1 + (torch.rand(len(answers), generator=generator) * length).long()
    order = torch.rand(answers.shape, generator=generator).masked_fill(~answers, 2.0).argsort(-1).argsort(-1)
    return order < n[:, None]


def masked_loss(
    model: Any, ids: Tensor, answers: Tensor, masked: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """(L / n) sum over the n `masked` places of -log p(x_i | x with them masked), of all rows, per token of `answers`.

    With `choose_masked` its mean is -log p(answer | prompt) / L, in nats, of an answer of L tokens that are written one
    by one in random order: arXiv:2502.09992, equation 6, which has the mean of the loss with weights 1 / t (equation
    3), and varies less.
    """
    noisy = ids.masked_fill(masked, model.config.mask_token_id)
    # logits of the masked tokens alone
    hidden = model.model(input_ids=noisy, attention_mask=attention_mask).last_hidden_state[masked]
    losses = F.cross_entropy(model.lm_head(hidden), ids[masked], reduction="none")
    weights = (answers.sum(-1) / masked.sum(-1))[:, None].expand_as(masked)[masked]
    return (weights * losses).sum() / answers.sum()


@torch.inference_mode()
def denoise(
    model: Any,
    prompt: Tensor | Sequence[int],
    answer_length: int,
    steps: int,
    block_length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts and their answers, (batch, prompt + answer_length): LLaDA's low-confidence remasking.

    The answer is written block by block. Each of a block's steps predicts a token x_i for all of its m masked places
    and keeps the floor(m / steps) of the highest p(x_i), in the first m mod steps of them one more. Everything is
    computed anew in each step. The place further left wins a tie.

    Unlike the paper's code, the mask token is never predicted.

    Args:
        prompt: (batch, prompt), or one prompt's ids.
        steps: of all blocks together; `answer_length` writes one token per step.
        temperature: x_i = argmax logits + temperature * Gumbel noise; but p is that of the model, without either.
        generator: draws the noise.
    """
    ids = torch.as_tensor(prompt, device=model.device)
    ids = ids[None] if ids.ndim == 1 else ids
    blocks, rest = divmod(answer_length, block_length)
    if rest or steps % blocks or not blocks <= steps <= answer_length:
        raise ValueError(
            f"answer_length = {answer_length} must be a multiple of block_length = {block_length}, and steps = {steps} "
            "one of the number of blocks, at most answer_length"
        )
    start, mask = ids.shape[1], model.config.mask_token_id
    ids = F.pad(ids, (0, answer_length), value=mask)
    for block in range(start, start + answer_length, block_length):
        places = slice(block, block + block_length)
        for kept in transfers(block_length, steps // blocks):
            logits = model(input_ids=ids).logits[:, places].double()
            logits[..., mask] = -torch.inf
            tokens = (logits + gumbel(logits, temperature, generator)).argmax(-1)
            confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            confidence = confidence.where(ids[:, places] == mask, -torch.inf)
            chosen = confidence.sort(descending=True, stable=True).indices[:, :kept]
            ids[:, places] = ids[:, places].scatter(-1, chosen, tokens.gather(-1, chosen))
    return ids


def transfers(masked: int, steps: int) -> list[int]:
    """How many of `masked` places each of `steps` fills: as many in each, and in the first ones one more.

    >>> transfers(8, 3)
    [3, 3, 2]
    """
    return [masked // steps + (step < masked % steps) for step in range(steps)]


def gumbel(like: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """temperature * -log(-log u) in the shape of `like`; zero without a draw at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(like)
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return -temperature * (-uniform.log()).log()
