"""Prompts whose answers stand in their context: what a KV cache must keep. Needs no package but numpy and a tokenizer.

A prompt holds records, `amber river`, alone or between sentences of prose, and asks for some of them at its end.
Words are whole tokens, so an answer is one token, and a wrong one is wrong at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("records", "needles", "copy")


@dataclass(frozen=True)
class Prompt:
    """Token ids of context, questions and answers, and the places of the answers in them.

    The answer at place p is to be predicted from the tokens before p.

    Args:
        chance: how often the value of any record of the context is right.
    """

    ids: list[int]
    answers: list[int]
    chance: float


class Recall:
    """Makes prompts of one tokenizer.

    Args:
        filler: token ids of prose, from which `needles` takes what stands between the records.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[int] | np.ndarray) -> None:
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.filler = np.asarray(filler)
        self.words = words(tokenizer)
        (self.newline,), self.bos = encode("\n"), tokenizer.bos_token_id
        self.question, self.again = encode("?\n"), encode("Again:")

    def prompt(self, kind: str, length: int, seed: Sequence[int], questions: int = 1) -> Prompt:
        """A prompt of at most `length` tokens, its `questions` and their answers included.

        Args:
            kind: `records`: nothing but records; `needles`: a few among prose; `copy`: a list of words to repeat.
            seed: same seed, same prompt.
        """
        random = np.random.default_rng([KINDS.index(kind), length, *seed])
        if kind == "copy":
            return self._copy(length, random)
        # a record is its key, its value and a line break, and so is a question with its answer
        room = length - 1 - len(self.question) - 3 * questions
        count = min(room // 3, len(self.words) // 2) if kind == "records" else max(questions, min(16, room // 32))
        chosen = random.choice(len(self.words), 2 * count, replace=False)
        keys, values = self.words[chosen[:count]].tolist(), self.words[chosen[count:]].tolist()
        records = [[key, value, self.newline] for key, value in zip(keys, values)]
        between = self._between(count, room - 4 * count - 1, random) if kind == "needles" else [[]] * (count + 1)
        ids = [self.bos]
        for prose, record in zip(between, [*records, []]):
            ids += [*prose, *record]
        ids += self.question
        answers = []
        for asked in random.choice(count, questions, replace=False):
            answers.append(len(ids) + 1)
            ids += records[asked]
        return Prompt(ids, answers, 1 / count)

    def _between(self, count: int, room: int, random: np.random.Generator) -> list[list[int]]:
        """`room` tokens of prose cut at random places: what stands before, between and after `count` records."""
        start = random.integers(len(self.filler) - room)
        pieces = np.split(self.filler[start : start + room], np.sort(random.integers(0, room + 1, count)))
        return [[*piece.tolist(), self.newline] if len(piece) else [] for piece in pieces]

    def _copy(self, length: int, random: np.random.Generator) -> Prompt:
        count = (length - 1 - len(self.again) - 1) // 2
        chosen = self.words[random.choice(len(self.words), count)].tolist()
        ids = [self.bos, *chosen, self.newline, *self.again, *chosen]
        # the first word stands nowhere but at the start; it is asked for, too
        return Prompt(ids, list(range(len(ids) - count, len(ids))), 1 / count)


def words(tokenizer: Any) -> np.ndarray:
    """Ids of the tokens that are a space and a word of at least four small letters."""
    found = [
        index
        for token, index in tokenizer.get_vocab().items()
        if token[0] == "Ġ" and len(token) > 4 and token[1:].isascii() and token[1:].isalpha() and token[1:].islower()
    ]
    return np.array(sorted(found))
