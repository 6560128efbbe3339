"""Language models: perplexity on held-out prose, recall from the context, agreement with another model."""

import collections
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tersor.integration import evaluation, zoo
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.recall import Recall

HELD_OUT_TOKENS, SEQ_LEN = 8192, 512


def figures(name: str, model: Any, tokenizer: Any) -> list[Figure]:
    rows = evaluation.windows(tokenizer, zoo.held_out_text(), HELD_OUT_TOKENS, SEQ_LEN)
    found = [
        Figure(
            f"perplexity of {HELD_OUT_TOKENS:,} held-out tokens",
            evaluation.read(model, rows).perplexity,
            bigram_perplexity(rows, _calibration(tokenizer), len(tokenizer)),
            "bigrams",
            is_share=False,
        )
    ]
    if name == "tiny-lm":
        for kind in ("records", "needles", "copy"):
            accuracy, chance = recall(model, tokenizer, kind, SEQ_LEN)
            found.append(
                Figure(f"recall, {kind}, {SEQ_LEN} tokens", accuracy, chance, "a word of the context", bar=0.95)
            )
    if name == "tiny-draft":
        teacher = zoo.load("tiny-lm")[0]
        found.append(
            Figure(
                "same next token as tiny-lm",
                agreement(model, teacher, rows),
                bigram_agreement(teacher, _calibration(tokenizer), rows),
                "bigrams",
            )
        )
    return found


@torch.inference_mode()
def recall(
    model: Any, tokenizer: Any, kind: str, length: int, prompts: int = 60, questions: int = 2, seed: int = 0
) -> tuple[float, float]:
    """Share of the answers of held-out prompts of `length` tokens that are right, and what guessing a value gives.

    Prose between the records is from held-out documents. An answer is asked for with all before it given.
    """
    filler = tokenizer(zoo.held_out_text(), add_special_tokens=False, verbose=False).input_ids
    maker = Recall(tokenizer, filler)
    right = asked = 0
    chance = 0.0
    for number in range(prompts):
        prompt = maker.prompt(kind, length, [seed, number], questions)
        ids = torch.tensor([prompt.ids], device=model.device)
        places = torch.tensor(prompt.answers, device=model.device)
        predicted = model(ids).logits[0].argmax(-1)[places - 1]
        right += int((predicted == ids[0, places]).sum())
        asked += len(places)
        chance += prompt.chance * len(places)
    return right / asked, chance / asked


@torch.inference_mode()
def agreement(model: Any, other: Any, rows: Tensor) -> float:
    """Share of the positions of `rows` (n, seq) at which both models find the same token likeliest."""
    same = [(model(row[None]).logits.argmax(-1) == other(row[None]).logits.argmax(-1)).float().mean() for row in rows]
    return torch.stack(same).mean().item()


@torch.inference_mode()
def bigram_agreement(model: Any, fitted_to: list[int], rows: Tensor) -> float:
    """The same for guessing what followed a token most often in the text `fitted_to`, token ids."""
    pairs = collections.Counter(itertools.pairwise(fitted_to))
    likeliest = {first: second for (first, second), _ in sorted(pairs.items(), key=lambda item: item[1])}
    common = collections.Counter(fitted_to).most_common(1)[0][0]
    guesses = torch.tensor([[likeliest.get(token, common) for token in row] for row in rows.tolist()])
    return torch.cat([model(row[None]).logits.argmax(-1) for row in rows]).eq(guesses).float().mean().item()


def bigram_perplexity(rows: Tensor, fitted_to: list[int], vocab_size: int) -> float:
    """Of `rows` (n, seq) under pairs of tokens counted in the text `fitted_to`, token ids. Backs off to single tokens as
    Witten and Bell do: the more kinds of tokens have followed one, the likelier a new one."""
    counts, pairs = collections.Counter(fitted_to), collections.Counter(itertools.pairwise(fitted_to))
    followers = collections.Counter(first for first, _ in pairs)

    def probability(first: int, second: int) -> float:
        single = (counts[second] + 1) / (len(fitted_to) + vocab_size)
        kinds = followers[first]
        return (pairs[first, second] + kinds * single) / (counts[first] + kinds) if kinds else single

    logs = [math.log(probability(*pair)) for row in rows.tolist() for pair in itertools.pairwise(row)]
    return math.exp(-sum(logs) / len(logs))


def _calibration(tokenizer: Any) -> list[int]:
    return tokenizer(zoo.calibration_text(), add_special_tokens=False, verbose=False).input_ids
