"""Drafts copied from the text so far: what followed the last few tokens when they stood there before."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class NgramDrafter:
    """Copy what followed an earlier occurrence of the last n tokens, for the largest n <= max_ngram that has one.

    Source: https://github.com/apoorvumang/prompt-lookup-decoding. There, as in `prompt_lookup_num_tokens` of
    transformers, the *oldest* occurrence is taken, by a scan over the whole text at each step. Here the *latest* one,
    which follows the text's present turn, found in a table that grows by `max_ngram` entries per token. A copy that
    reaches the end of the text goes on reading its own beginning, as in LZ77, so that a loop of any period is drafted
    at full length.

    Args:
        max_ngram: longest suffix to look up, in tokens.
        pick: which occurrence; "first" drafts what transformers drafts, but for the run-on at the end.
    """

    needs_draft_model: ClassVar[bool] = False

    max_ngram: int = 3
    pick: Literal["latest", "first"] = "latest"

    def __post_init__(self) -> None:
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {self.max_ngram}")
        if self.pick not in ("latest", "first"):
            raise ValueError(f"pick must be 'latest' or 'first', got {self.pick!r}")

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None, draft_model: PreTrainedModel | None = None
    ) -> "NgramTables":
        mask = [[1] * input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.tolist()
        tables = [NgramTable(self.max_ngram, self.pick) for _ in mask]
        for table, row, kept in zip(tables, input_ids.tolist(), mask):
            table.extend([token for token, keep in zip(row, kept) if keep])
        return NgramTables(tables, input_ids.shape[1])


class NgramTables:
    """The tables of a batch, and how much of it they have read."""

    def __init__(self, tables: list["NgramTable"], read: int):
        self.tables = tables
        self.read = read

    def draft(self, input_ids: Tensor, num_draft: int) -> list[list[int]]:
        for table, new in zip(self.tables, input_ids[:, self.read :].tolist()):
            table.extend(new)
        self.read = input_ids.shape[1]
        return [table.draft(num_draft) for table in self.tables]


class NgramTable:
    """Where each n-gram of a text went on: position of the token after its latest (or first) occurrence."""

    def __init__(self, max_ngram: int, pick: str):
        self.text: list[int] = []
        self.after: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_ngram + 1)]
        self.pick = pick

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            # an n-gram enters when its continuation arrives, so the suffix of the text never finds itself
            end = len(self.text)
            for n in range(1, min(len(self.after) - 1, end) + 1):
                ngram = tuple(self.text[end - n :])
                if self.pick == "latest":
                    self.after[n][ngram] = end
                else:
                    self.after[n].setdefault(ngram, end)
            self.text.append(token)

    def draft(self, num_draft: int) -> list[int]:
        end = len(self.text)
        for n in range(min(len(self.after) - 1, end), 0, -1):
            start = self.after[n].get(tuple(self.text[end - n :]))
            if start is not None:
                copy: list[int] = []
                for source in range(start, start + num_draft):
                    copy.append(self.text[source] if source < end else copy[source - end])
                return copy
        return []
