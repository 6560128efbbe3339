"""Draft lengths from nothing but the outcome of the last draft."""

from dataclasses import dataclass


@dataclass(frozen=True)
class _Starting:
    """The first draft has `num_draft` tokens."""

    num_draft: int

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise ValueError(
                f"num_draft must be at least 1, got {self.num_draft}; recipes.greedy() decodes without drafts"
            )

    def first(self) -> int:
        return self.num_draft


@dataclass(frozen=True)
class FixedLength(_Starting):
    """Always `num_draft` tokens."""

    num_draft: int = 10

    def next(self, num_draft: int, proposed: int, accepted: int) -> int:
        return num_draft


@dataclass(frozen=True)
class Heuristic(_Starting):
    """Two more after a draft that was accepted whole, else one less, at least 1.

    Source: transformers' assisted generation (https://huggingface.co/blog/assisted-generation), whose rule this is.

    Args:
        num_draft: length of the first draft.
    """

    num_draft: int = 5

    def next(self, num_draft: int, proposed: int, accepted: int) -> int:
        return num_draft + 2 if accepted == proposed else max(1, num_draft - 1)
