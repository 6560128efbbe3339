"""Drafts written by a smaller model."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class ModelDrafter:
    """argmax of `draft_model`, token after token, with a cache of its own.

    Source: arXiv:2211.17192. There drafts are drawn when the target samples, and a ratio test decides; here they are
    always greedy, so that `SampleMatch` serves and sampling keeps its seed. A greedy draft x is accepted with
    probability p(x), a drawn one with 1 - TV(p, q): nearly the same where the models are sure of themselves.
    """

    needs_draft_model: ClassVar[bool] = True

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None, draft_model: PreTrainedModel | None
    ) -> "DraftRun":
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return DraftRun(draft_model, input_ids[:, :0], mask)


class DraftRun:
    """The draft model in mid-generation.

    Args:
        read: tokens (batch, seq) whose states its cache holds: committed ones, and drafted ones not known to be wrong.
        mask: attention mask (batch, seq) of the prompt.
    """

    def __init__(self, model: Any, read: Tensor, mask: Tensor):
        self.model = model
        self.read = read
        self.mask = mask
        # without a config sliding windows are kept whole (and masked): only so can several forwards be taken back
        self.cache = DynamicCache()

    def draft(self, input_ids: Tensor, num_draft: int) -> list[list[int]]:
        known = self._forget_all_but(input_ids)
        drafted = input_ids
        for _ in range(num_draft):
            logits = self._forward(drafted, known)
            known = drafted.shape[1]
            drafted = torch.cat([drafted, logits.argmax(-1, keepdim=True)], -1)
        self.read = drafted[:, :known]
        return drafted[:, input_ids.shape[1] :].tolist()

    def _forget_all_but(self, input_ids: Tensor) -> int:
        """Crops the cache to its common beginning with `input_ids`, without the last token, and returns the length."""
        length = min(self.read.shape[1], input_ids.shape[1] - 1)
        same = (self.read[:, :length] == input_ids[:, :length]).all(0)
        known = int(same.long().cumprod(0).sum())
        if self.read.shape[1]:
            self.cache.crop(known - self.read.shape[1])
        return known

    def _forward(self, tokens: Tensor, known: int) -> Tensor:
        """Logits (batch, vocab) after `tokens`, of which the cache holds the first `known`."""
        mask = torch.nn.functional.pad(self.mask, (0, tokens.shape[1] - self.mask.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=tokens[:, known:],
            attention_mask=mask,
            position_ids=positions[:, known:],
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.logits[:, -1]
