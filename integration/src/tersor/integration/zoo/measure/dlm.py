"""The masked diffusion language model: how many tasks it solves, and a bound on its perplexity."""

import collections
import math
from typing import Any

import torch
from torch import Tensor

from tersor.integration import evaluation, zoo
from tersor.integration.zoo.dlm import choose_masked, denoise, masked_loss
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.tasks import KINDS, Task, Tasks

ROOM = 16  # tokens of an answer, with the end-of-text tokens that fill it up
TASKS, HELD_OUT_TOKENS, SEQ_LEN = 50, 4096, 128


def figures(name: str, model: Any, tokenizer: Any) -> list[Figure]:
    found = []
    for kind in KINDS:
        tasks = held_out_tasks(tokenizer, kind, TASKS)
        right = solved(model, tasks, tokenizer.eos_token_id)
        chance = sum(task.chance for task in tasks) / len(tasks)
        guess = "a random sum" if kind == "add" else "random items" if kind == "shuffle" else "a random order"
        found.append(Figure(f"{kind}, whole answers right", right, chance, guess, bar=0.9))
    rows = evaluation.windows(tokenizer, zoo.held_out_text(), HELD_OUT_TOKENS, SEQ_LEN)
    metric = f"perplexity of {HELD_OUT_TOKENS:,} held-out tokens, at most"
    found.append(Figure(metric, perplexity(model, rows), unigram_perplexity(rows, tokenizer), "unigrams", None, False))
    return found


def held_out_tasks(tokenizer: Any, kind: str, count: int, seed: int = 0) -> list[Task]:
    """`count` tasks that nothing like was trained on."""
    maker = Tasks(tokenizer)
    return [maker.task(kind, [seed, number], "test") for number in range(count)]


def solved(model: Any, tasks: list[Task], eos_token_id: int, room: int = ROOM, steps: int = ROOM) -> float:
    """Share of `tasks` whose whole answer is right, written into a `room` in so many `steps`, without temperature."""
    same_length = collections.defaultdict(list)
    for task in tasks:
        same_length[len(task.prompt_ids)].append(task)
    right = 0
    for together in same_length.values():
        ids = denoise(model, torch.tensor([task.prompt_ids for task in together]), room, steps, room)
        answers = ids[:, -room:].tolist()
        right += sum(task.is_right(answer, eos_token_id) for task, answer in zip(together, answers))
    return right / len(tasks)


@torch.inference_mode()
def perplexity(model: Any, rows: Tensor, draws: int = 4, seed: int = 0) -> float:
    """exp of `masked_loss` of `rows` (n, seq) without their BOS, the mean of so many `draws` of masks: at least the
    perplexity of the text, written in whatever order (arXiv:2502.09992, equation 6)."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.ones_like(rows, dtype=torch.bool)
    answers[:, 0] = False
    losses = [masked_loss(model, rows, answers, choose_masked(answers, generator)) for _ in range(draws)]
    return torch.stack(losses).mean().exp().item()


def unigram_perplexity(rows: Tensor, tokenizer: Any) -> float:
    """Of `rows` (n, seq) without their BOS, under tokens counted in the calibration text, each once more."""
    counts = collections.Counter(tokenizer(zoo.calibration_text(), add_special_tokens=False, verbose=False).input_ids)
    total = counts.total() + len(tokenizer)
    logs = [math.log((counts[token] + 1) / total) for token in rows[:, 1:].flatten().tolist()]
    return math.exp(-sum(logs) / len(logs))
