"""Vision-language models: answers about canvases of test images."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tersor.integration.zoo.canvas import KINDS, Canvas, Canvases, Question
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.training import images
from tersor.integration.zoo.training import vlm as training

CANVASES, PER_KIND, BATCH = 400, 2, 4


def figures(name: str, model: Any, processor: Any) -> list[Figure]:
    canvases, questions = held_out(CANVASES)
    right = answered(model, processor, canvases, questions)
    asked = [question for about in questions for question in about]
    found = []
    for kind in KINDS:
        answers = [question.answer for question in asked if question.kind == kind]
        shares = [is_right for question, is_right in zip(asked, right) if question.kind == kind]
        answer, times = collections.Counter(answers).most_common(1)[0]
        guess = f"always{answer!r}".replace("' ", " '")
        found.append(Figure(f"right answers, {kind}", float(np.mean(shares)), times / len(answers), guess))
    overall = Figure(
        f"right answers, {len(asked):,} questions, mean of the kinds",
        float(np.mean([figure.value for figure in found])),
        float(np.mean([figure.baseline for figure in found])),
        "each kind's most frequent answer",
        bar=training.TRAININGS[name].bar,
    )
    return [overall, *found]


def held_out(count: int, seed: int = 0) -> tuple[list[Canvas], list[list[Question]]]:
    """Canvases of test images and, about each, questions: two of each kind, one where there is no second one.

    Raises:
        UserError: the Debian package of Fashion-MNIST is missing.
    """
    pictures, labels = images.read("test")
    source = Canvases(pictures.numpy(), labels.numpy())
    canvases = [source.draw([seed, number]) for number in range(count)]
    randoms = [np.random.default_rng([seed, number, 1]) for number in range(count)]
    return canvases, [canvas.questions(random, PER_KIND) for canvas, random in zip(canvases, randoms)]


@torch.inference_mode()
def answered(
    model: Any, processor: Any, canvases: Sequence[Canvas], questions: Sequence[Sequence[Question]]
) -> list[bool]:
    """Whether `model` answers each of all the questions as greedy generation must to be right: each token of the
    answer and its end are the likeliest after the right ones before."""
    right: list[bool] = []
    for first in range(0, len(canvases), BATCH):
        about = questions[first : first + BATCH]
        batch = training.batch(processor, canvases[first : first + BATCH], about)
        logits, wanted, numbers = training.predictions(model, batch)
        wrong = set(numbers[logits.argmax(-1) != wanted].tolist())
        right += [number not in wrong for number in range(sum(map(len, about)))]
    return right
