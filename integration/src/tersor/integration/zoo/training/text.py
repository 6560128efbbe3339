"""The text that language models are trained on: random windows of the corpus, each source with its weight."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.integration.zoo import data
from tersor.integration.zoo.training.corpus import SOURCES


def documents(split: str) -> list[dict[str, Any]]:
    """All documents of `split`, prose and source code: `text`, `name`, `source`, `licence`.

    Raises:
        UserError: the packages they come from have not been fetched.
    """
    rows: list[Any] = [*data.load("prose", split), *data.load("source-code", split)]
    return rows


class Text:
    """The training documents as token ids.

    Args:
        documents: `text` and `source` of each.
        tokenizer: writes its BOS before each document.
    """

    def __init__(self, documents: list[dict[str, Any]], tokenizer: Any) -> None:
        self.streams = [
            encode([d["text"] for d in documents if d["source"] == source.package], tokenizer) for source in SOURCES
        ]
        self.weights = [source.weight for source in SOURCES]

    def windows(self, batch_size: int, seq_len: int, random: np.random.Generator) -> Tensor:
        """Token ids, (batch_size, seq_len + 1)."""
        rows = []
        for stream in random.choice(len(self.streams), batch_size, p=self.weights):
            tokens = self.streams[stream]
            start = random.integers(len(tokens) - seq_len - 1)
            rows.append(tokens[start : start + seq_len + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def encode(texts: list[str], tokenizer: Any) -> np.ndarray:
    """Token ids of all `texts` in a row, BOS before each; uint16."""
    bos = tokenizer.bos_token_id
    ids = [[bos, *encoding.ids] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(i, np.uint16) for i in ids])
