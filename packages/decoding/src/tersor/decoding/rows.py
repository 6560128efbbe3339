"""The batch that is being written: one token of each row at a time, as the plain decoding loop does it."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Rows:
    """Committed tokens of a batch and what decides on the next ones.

    Args:
        choose: the next token (batch,) from processed scores (batch, vocab).
    """

    def __init__(
        self,
        input_ids: Tensor,
        choose,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ):
        self.input_ids = input_ids
        self.choose = choose
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        keep = generation_config.return_dict_in_generate
        self.scores = () if keep and generation_config.output_scores else None
        self.logits = () if keep and generation_config.output_logits else None
        stops = [c.eos_token_id for c in stopping_criteria if hasattr(c, "eos_token_id")]
        self.eos = {token for stop in stops for token in torch.as_tensor(stop).flatten().tolist()}
        pad = generation_config._pad_token_tensor
        self.pad = int(pad) if pad is not None else min(self.eos, default=0)
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def finished(self) -> bool:
        return not self.unfinished.any()

    @property
    def live(self) -> Tensor:
        """Rows (batch,) whose tokens matter. As in `generate`, rows are padded once they end only where an
        end-of-sequence token exists; otherwise all go on until the last one is finished."""
        return self.unfinished if self.eos else torch.ones_like(self.unfinished)

    @property
    def room(self) -> int | None:
        """How many tokens may still come; None when no length is set."""
        longest = self.stopping_criteria.max_length
        return None if longest is None else longest - self.input_ids.shape[1]

    def append(self, logits: Tensor) -> Tensor:
        """Choose and commit the tokens (batch,) after the present ones, from their logits (batch, vocab)."""
        # float32 as in the plain loop; a copy, because processors may write into it
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.logits_processor(self.input_ids, logits)  # type: ignore[arg-type]
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        tokens = self.choose(scores).where(self.live, self.pad)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], -1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.unfinished = self.unfinished & ~self.stopping_criteria(self.input_ids, self.scores)  # type: ignore[arg-type]
        return tokens

    def align(self, drafts: list[list[int]]) -> Tensor:
        """One draft (batch, length) of each row's: as long as the shortest of a live row; finished rows are padded."""
        live = self.live
        # nothing follows an end of sequence. The token itself stays: to drop drawn tokens for what they are is a bias
        ends = [next((i + 1 for i, t in enumerate(row) if t in self.eos), len(row)) for row in drafts]
        length = min((end for end, alive in zip(ends, live.tolist()) if alive), default=0)
        padded = [row[:length] + [self.pad] * (length - len(row)) for row in drafts]
        draft = self.input_ids.new_tensor(padded).view(len(drafts), length)
        return draft.where(live[:, None], self.pad)
