"""What quantised models store and lose against the original, on the text that the benchmarks of models share."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quant import Recipe, quantize
from tersor.quant.linear import bits_per_weight

LENGTH = 256
# sequences for each step of what learns
BATCH_SIZE = {"tiny-lm": 8, "gemma-3-270m": 2}


@dataclass(frozen=True)
class Subject:
    """A trained model, and prose in its tokens: to learn from, and to measure with what follows.

    Args:
        calibration: (32, LENGTH).
        text: (rows, LENGTH).
    """

    name: str
    model: Any
    calibration: Tensor
    text: Tensor

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any, prose: str, rows: int = 48) -> "Subject":
        """Each row begins with what the tokenizer puts before a text: without its <bos> Gemma knows little."""
        start = tokenizer("").input_ids
        ids = torch.tensor(tokenizer(prose, add_special_tokens=False, verbose=False).input_ids)
        width = LENGTH - len(start)
        ids = torch.cat([torch.tensor([start] * (32 + rows)).long(), ids[: (32 + rows) * width].view(-1, width)], 1)
        return cls(name, model, ids[:32], ids[32:])

    @cached_property
    def log_p(self) -> list[Tensor]:
        """What the original predicts, (LENGTH - 1, vocabulary) for each row, with which all is compared: 4 GB of Gemma's."""
        return predictions(self.model, self.text)


def measure(
    benchmark: Any,
    subject: Subject,
    widths: str,
    name: str,
    quantise: Callable[[Any, Tensor], tuple[Any, float]],
) -> None:
    """Time `quantise(model, calibration)` on a copy of the model; `extra_info` becomes a row for `table.py`.

    Args:
        widths: of weights, and of inputs if they are rounded: "W4", "W4A8".
        quantise: returns a model, and the bits per weight that it would take in its own format.
    """
    weights = sum(linear.weight.numel() for linear in body(subject.model))
    model, bits_per_weight = benchmark.pedantic(quantise, (copy.deepcopy(subject.model), subject.calibration), rounds=1)
    row = {"model": subject.name, "widths": widths, "name": name, "bits_per_weight": bits_per_weight}
    row |= {"nbytes": bits_per_weight * weights / 8}
    benchmark.extra_info |= row | losses(subject, model)


def with_recipe(recipe: Recipe, name: str, model: Any, calibration: Tensor) -> tuple[Any, float]:
    """`quantise` of `measure`, of one of ours: steps for the whole model's predictions see as much as those of blocks."""
    batch_size = BATCH_SIZE[name]
    tuning = tuple(replace(t, batch_size=batch_size) if hasattr(t, "batch_size") else t for t in recipe.tuning)
    model = quantize(model, replace(recipe, tuning=tuning), calibration.split(batch_size))
    return model, bits_per_weight(model)


def body(model: Any) -> list[nn.Linear]:
    """What is quantised of a dense model: all linears but the output head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


@torch.no_grad()
def predictions(model: Any, text: Tensor) -> list[Tensor]:
    """Logarithms of probabilities: (LENGTH - 1, vocabulary) for each row of `text`."""
    return [model(row[None]).logits[0, :-1].log_softmax(-1) for row in text]


@torch.no_grad()
def losses(subject: Subject, model: Any) -> dict[str, float]:
    """Perplexity, KL divergence to the original in nats per token, and the share of tokens that another one outdoes."""
    loss = divergence = flips = 0.0
    # row by row: predictions over a vocabulary of 262144 are a quarter of a gigabyte
    for row, log_p in zip(subject.text, subject.log_p):
        (log_q,) = predictions(model, row[None])
        loss -= float(log_q.gather(-1, row[1:, None]).sum())
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        flips += int((log_p.argmax(-1) != log_q.argmax(-1)).sum())
    count = subject.text[:, 1:].numel()
    return {"perplexity": math.exp(loss / count), "divergence": divergence / count, "flips": flips / count}
