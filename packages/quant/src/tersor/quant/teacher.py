"""What a model predicted before its weights changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tersor.quant.processes import over_processes

# logits that are held at a time, of 4 bytes each
_LOGITS = 2**25


def rows(data: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches as inputs of the model of one sequence each, (1, seq_len)."""
    return [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in data
        for row in range(len(batch["input_ids"]))
    ]


class Teacher:
    """What a model predicts for some text, to be compared with what it predicts once its weights have changed.

    The divergence is KL(p || q), p before and q after, over the `top_k` likeliest tokens of p and all others as one:
    never more than that over all tokens, and closer to it than over the likeliest alone (arXiv:2410.14649 keeps 10).

    Args:
        rows: inputs of the model, (1, seq_len) each.
        top_k: kept for each token of the text; None: all.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Sequence[Mapping[str, Tensor]], top_k: int | None = None) -> None:
        self.model, self.rows = model, rows
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._tokens = _LOGITS // vocab_size  # run together
        kept = vocab_size if top_k is None else min(top_k, vocab_size)
        self._likeliest = [log_p.topk(kept) for log_p in self._predictions(range(len(rows)))]

    @property
    def num_tokens(self) -> list[int]:
        """Of each row, those that are no padding."""
        return [len(likeliest.values) for likeliest in self._likeliest]

    @torch.no_grad()
    def divergence(self, rows: Sequence[int] | None = None) -> float:
        """Nats per token, over some of the rows or all, and over those of all processes: each gives its own."""
        rows = range(len(self.rows)) if rows is None else rows
        total = sum(float(of_row.sum()) for of_row in self.divergences(rows))
        num_tokens = self.num_tokens
        tokens = sum(num_tokens[row] for row in rows)
        found = torch.tensor([total, tokens], dtype=torch.float64, device=self.model.device)
        total, tokens = over_processes(found).tolist()
        return total / tokens

    def divergences(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Of each token that is no padding, (tokens,), row by row, in nats; gradients flow back into the model."""
        for row, log_q in zip(rows, self._predictions(rows), strict=True):
            log_p, tokens = self._likeliest[row]
            yield _divergence(log_p, log_q.gather(-1, tokens))

    def backward(self, rows: Sequence[int], loss: Callable[[Sequence[int]], Tensor] | None = None) -> None:
        """Add to the gradients those of a sum over the tokens of some rows; of their logits a part is held at a time.

        Of a mean, most would be below what float16 can tell from zero.

        Args:
            loss: of each token of the rows that it is given, (tokens,); None: their divergence.
        """
        for part in self._parts(rows):
            of_tokens = loss(part) if loss else torch.cat([*self.divergences(part)])
            of_tokens.sum().backward()

    def entropies(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Of the model's own predictions for the same tokens, (tokens,), in nats: never more than over all tokens."""
        for row in rows:
            p = self._likeliest[row].values.double().exp()
            rest = (1 - p.sum(-1)).clamp(min=1e-6)
            yield -(p * p.log()).nan_to_num().sum(-1) - rest * rest.log()

    def _predictions(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Log-probabilities (tokens, vocab) of the token after each that is no padding, row by row."""
        for part in self._parts(rows):
            part = [self.rows[row] for row in part]
            inputs = {name: torch.cat([row[name] for row in part]).to(self.model.device) for name in part[0]}
            logits = self.model(**inputs, use_cache=False).logits
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            for of_row, counts in zip(logits, mask):
                yield of_row[counts].float().log_softmax(-1)

    def _parts(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """`rows`, by those that are run together."""
        for (seq_len, _), same in groupby(
            rows, lambda row: (self.rows[row]["input_ids"].shape[1], self.rows[row].keys())
        ):
            same = list(same)
            step = max(1, self._tokens // seq_len)
            yield from (same[start : start + step] for start in range(0, len(same), step))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, over the columns and one more for what they leave to 1."""
    # float64: p and q are nearly equal
    p, q, gained = log_p.double().exp(), log_q.double().exp(), log_p.double() - log_q.double()
    # 1e-6: below that, what is left of a sum of float32 is rounding
    rest_p, rest_q = ((1 - some.sum(-1)).clamp(min=1e-6) for some in (p, q))
    # -p + q adds up to zero, but without it what rounding takes from the sum of q would count as a loss
    return (p * gained - p + q).sum(-1) + rest_p * (rest_p / rest_q).log() - rest_p + rest_q
