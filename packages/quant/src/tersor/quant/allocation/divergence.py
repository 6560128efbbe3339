"""How far a changed model's predictions are from the dense one's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.protocol import Table
from tersor.quant.calibration import num_tokens
from tersor.quant.teacher import Teacher, rows

# of random text, for want of real one
_SEQ_LEN = 256


@contextmanager
def swapped(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values; only pointers change."""
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter)
        yield
    finally:
        for parameter, value in before.items():
            parameter.data = value


def text(candidates: Candidates, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows of the calibration data, up to so many tokens; random tokens if there is none."""
    if not candidates.data:
        # configs of models that also see or hear have no vocab_size of their own
        vocab_size = candidates.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        seq_len = min(_SEQ_LEN, tokens)
        shape = (-(-tokens // seq_len), 1, seq_len)
        return [{"input_ids": ids} for ids in torch.randint(vocab_size, shape, generator=generator)]
    found = []
    for row in rows(candidates.data):
        if tokens > 0:
            found.append(row)
            tokens -= num_tokens(row)
    return found


@dataclass(frozen=True)
class LayerDivergence:
    """KL divergence of the model with this layer alone compressed (CalibTIP, arXiv:2006.10518).

    One pass of the text for every layer and grid. Unlike the paper's this needs no labels, and nothing is clipped: a
    divergence is not negative.

    Args:
        tokens: of the calibration data that are looked at.
        top_k: see `Teacher`.
        seed: of random tokens, where there is no calibration data.
    """

    tokens: int = 4096
    top_k: int | None = 64
    seed: int = 0

    def losses(self, candidates: Candidates) -> Table:
        teacher = Teacher(candidates.model, text(candidates, self.tokens, self.seed), self.top_k)
        table: Table = {}
        for name, linear, weights, _ in candidates.compressed(candidates.recipe):
            table[name] = []
            for weight in weights:
                with swapped({linear.weight: weight}):
                    table[name].append(teacher.divergence())
        return table
