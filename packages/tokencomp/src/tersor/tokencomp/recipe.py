"""What a token compression is made of: what is looked at, what happens to the rest, how many go where."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from tersor.tokencomp.state import TokenState


class Attended(NamedTuple):
    """What a layer has at hand between its attention and its MLP.

    Args:
        layer: number of the layer, from 0.
        x: (batch, tokens, dim), after attention and its residual.
        key: (batch, heads, tokens, head_dim), of this layer's attention.
    """

    layer: int
    x: Tensor
    key: Tensor


class Scorer(Protocol):
    def score(self, seen: Attended) -> Tensor:
        """(batch, tokens, dim): a feature per token to compare by; with dim = 1 its importance, larger stays."""
        ...


class Reducer(Protocol):
    def reduce(self, x: Tensor, state: TokenState, scores: Tensor, r: int) -> tuple[Tensor, TokenState]:
        """`x` (batch, tokens, dim) with `r` tokens fewer, 1 <= r <= limit."""
        ...

    def limit(self, num_tokens: int, num_protected: int) -> int:
        """The most tokens that one reduction can remove."""
        ...

    def attention_bias(self, state: TokenState) -> Tensor | None:
        """(batch, tokens), added to the attention logits of each key in later layers; None adds nothing."""
        ...

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        """Multiply-adds that `reduce` itself costs per image, with scores of `dim`."""
        ...


class Schedule(Protocol):
    def plan(self, num_layers: int, num_tokens: int) -> tuple[int, ...]:
        """Tokens to remove in each layer, for images that enter the first one with `num_tokens`."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A token compression; see `slim`.

    Args:
        scorer: what is looked at.
        reducer: what happens to the tokens that go.
        schedule: how many go in which layer.
    """

    scorer: Scorer
    reducer: Reducer
    schedule: Schedule
