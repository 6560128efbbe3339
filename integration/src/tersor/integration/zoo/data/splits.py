"""Which rows are for training, for validation and for testing: the same ones on every machine."""

from collections import Counter
from collections.abc import Iterable, Mapping

from tersor.integration.errors import UserError, near_match

SPLITS = ("train", "validation", "test")


def check(split: str, known: Iterable[str] = SPLITS) -> None:
    """
    Raises:
        UserError: there is no such split.
    """
    if split not in known:
        raise UserError(f"no split {split!r}{near_match(split, known)}")


def indices(split: str, labels: Iterable[int], shares: Mapping[str, int]) -> list[int]:
    """Rows of `split`: of each class' rows in turn, shares["train"] go to train, the next ones to validation, and so on.

    So every class has the same shares, whatever the order of the rows.
    """
    turn = [name for name, share in shares.items() for _ in range(share)]
    seen: Counter[int] = Counter()
    chosen = []
    for index, label in enumerate(labels):
        if turn[seen[label] % len(turn)] == split:
            chosen.append(index)
        seen[label] += 1
    return chosen
