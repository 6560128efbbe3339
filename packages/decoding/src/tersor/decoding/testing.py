"""A model whose next token is known: drafters and the loop are tested on it without weights."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ScriptedLM(PreTrainedModel, GenerationMixin):
    """A causal language model that says `next_token(prefix)`, with a score of 1 against 0.

    The prefix is read back from the keys that the cache returns, so a wrong crop gives wrong tokens.
    `.forwards` counts the tokens of every forward pass.

    >>> model = ScriptedLM(lambda prefix: (prefix[-1] + 1) % 10, vocab_size=10)
    >>> model.generate(torch.tensor([[3]]), max_new_tokens=4).tolist(), model.forwards
    ([[3, 4, 5, 6, 7]], [1, 1, 1, 1])
    """

    config_class = LlamaConfig

    def __init__(self, next_token: Callable[[list[int]], int], vocab_size: int, eos_token_id: int | None = None):
        super().__init__(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=1,
                num_hidden_layers=1,
                num_attention_heads=1,
                bos_token_id=None,
                eos_token_id=eos_token_id,
            )
        )
        self.next_token = next_token
        self.forwards: list[int] = []
        self.weight = torch.nn.Parameter(torch.zeros(()))  # gives the model a device and a dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        cache = DynamicCache() if past_key_values is None else past_key_values
        self.forwards.append(input_ids.shape[1])
        states = input_ids[:, None, :, None].to(self.weight.dtype)
        keys, _ = cache.update(states, states, 0)
        rows = keys[:, 0, :, 0].long().tolist()
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(rows):
            padding = 0 if attention_mask is None else int((attention_mask[row] == 0).sum())
            for i in range(input_ids.shape[1]):
                prefix = tokens[padding : len(tokens) - input_ids.shape[1] + i + 1]
                if prefix:
                    logits[row, i, self.next_token(prefix)] = 1.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]
