"""Tasks whose answers a program can check: what a model that writes in any order must get right. Needs no package but
numpy and a tokenizer.

    copy: red blue green => red blue green
    reverse: red blue green => green blue red
    shuffle: red blue green => blue red green
    sort: q c x => c q x
    add: 347 + 85 => 432
    code: add total x y => def total(x, y):
        return x + y

Of a shuffle any order is right: its tokens cannot be chosen without looking at one another, those of a copy can.
"""

import keyword
import math
import string
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .recall import words

KINDS = ("copy", "reverse", "shuffle", "sort", "add", "code")
SPLITS = ("train", "test")
LONGEST = {"copy": 8, "reverse": 8, "shuffle": 6, "sort": 6}  # items
TEMPLATES = {
    "add": " def {name}({x}, {y}):\n    return {x} + {y}",
    "subtract": " def {name}({x}, {y}):\n    return {x} - {y}",
    "multiply": " def {name}({x}, {y}):\n    return {x} * {y}",
    "loop": " for {x} in {name}:\n    print({x}, {y})",
    "larger": " if {x} > {y}:\n    return {name}",
    "smaller": " if {x} < {y}:\n    return {name}",
}


@dataclass(frozen=True)
class Task:
    """A prompt, BOS first, and its answer.

    Args:
        answer_ids: without the end-of-text tokens that fill its room.
        chance: how often an answer is right that is guessed: the items of the prompt in any order (`code`: in the
            right template; `shuffle`: each drawn anew), or any sum of two such numbers.
    """

    kind: str
    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]
    chance: float

    def is_right(self, answer_ids: Sequence[int], eos_token_id: int) -> bool:
        """Whether `answer_ids`, up to the first `eos_token_id`, is an answer."""
        ids = list(answer_ids)
        found = ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
        return sorted(found) == sorted(self.answer_ids) if self.kind == "shuffle" else found == self.answer_ids


class Tasks:
    """Makes tasks for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.bos = tokenizer, tokenizer.bos_token_id
        # what a code task calls a function must not be a keyword
        known = [tokenizer.decode([index]).strip() for index in words(tokenizer).tolist()]
        self.words = [word for word in known if not keyword.iskeyword(word)]

    def task(self, kind: str, seed: Sequence[int], split: str = "train", longest: int = 8) -> Task:
        """A task of `kind`: same seed, same task.

        Args:
            split: `train` or `test`. Tasks with the same kind and items are of the same one, in whatever order the
                items are.
            longest: of lists, in items; the shortest have 3, or one less than the longest.
        """
        random = np.random.default_rng([KINDS.index(kind), SPLITS.index(split), *seed])
        while True:
            content, answer, chance = getattr(self, f"_{kind}")(random, longest)
            if split_of(content) == split:
                break
        prompt = f"{kind}: {content} =>"
        encoded = self.tokenizer([prompt, answer], add_special_tokens=False).input_ids
        return Task(kind, prompt, answer, [self.bos, *encoded[0]], encoded[1], chance)

    def _list(self, kind: str, random: np.random.Generator, longest: int) -> list[str]:
        return [self.words[i] for i in random.choice(len(self.words), _count(kind, random, longest), replace=False)]

    def _copy(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        items = self._list("copy", random, longest)
        return " ".join(items), _spaced(items), _any_order(items)

    def _reverse(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        items = self._list("reverse", random, longest)
        return " ".join(items), _spaced(items[::-1]), _any_order(items)

    def _shuffle(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        items = self._list("shuffle", random, longest)
        chance = math.factorial(len(items)) / len(items) ** len(items)
        return " ".join(items), _spaced([items[i] for i in random.permutation(len(items))]), chance

    def _sort(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        count = _count("sort", random, longest)
        letters = [string.ascii_lowercase[i] for i in random.choice(26, count, replace=False)]
        return " ".join(letters), _spaced(sorted(letters)), _any_order(letters)

    def _add(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        # the sum has three digits, too, so that its digits stand where they are looked for
        a, b = int(random.integers(100, 900)), int(random.integers(10, 100))
        return f"{a} + {b}", f" {a + b}", 1 / 889

    def _code(self, random: np.random.Generator, longest: int) -> tuple[str, str, float]:
        command = list(TEMPLATES)[random.integers(len(TEMPLATES))]
        name = self.words[random.integers(len(self.words))]
        x, y = (string.ascii_lowercase[i] for i in random.choice(26, 2, replace=False))
        return f"{command} {name} {x} {y}", TEMPLATES[command].format(name=name, x=x, y=y), 1 / math.factorial(3)


def split_of(content: str) -> str:
    """`test` for a tenth of all contents, by a hash of their items."""
    return SPLITS[zlib.crc32(" ".join(sorted(content.split())).encode()) % 10 == 0]


def _count(kind: str, random: np.random.Generator, longest: int) -> int:
    return int(random.integers(min(3, longest - 1), min(longest, LONGEST[kind]) + 1))


def _spaced(items: Iterable[str]) -> str:
    return "".join(f" {item}" for item in items)


def _any_order(items: list[str]) -> float:
    return 1 / math.factorial(len(items))
