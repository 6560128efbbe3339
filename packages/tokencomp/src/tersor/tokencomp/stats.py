"""What a slimmed model did: counted, layer by layer."""

from dataclasses import dataclass, field
from typing import NamedTuple


class LayerCount(NamedTuple):
    """One layer, per image.

    `macs` are the multiply-adds of its matrix products, matching included; `dense_macs` had nothing been reduced.
    """

    tokens_in: int
    asked: int
    removed: int
    macs: int
    dense_macs: int

    @property
    def tokens_out(self) -> int:
        return self.tokens_in - self.removed


@dataclass
class Stats:
    """Counts since `slim`; `layers` are those of the latest forward.

    Multiply-adds are counted from the tokens that really went through each layer. They are no promise of speed:
    measure that (see `benchmarks/`).
    """

    images: int = 0
    macs: int = 0
    dense_macs: int = 0
    layers: list[LayerCount] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that enter each layer in the latest forward, then those that leave the last one."""
        return (*(count.tokens_in for count in self.layers), *(count.tokens_out for count in self.layers[-1:]))

    @property
    def clamped(self) -> tuple[int, ...]:
        """Layers of the latest forward that could not remove as many tokens as the schedule asked for."""
        return tuple(i for i, count in enumerate(self.layers) if count.removed < count.asked)

    @property
    def ratio(self) -> float:
        """Share of the layers' multiply-adds that was still done, 1.0 before any forward."""
        return self.macs / self.dense_macs if self.dense_macs else 1.0

    def add(self, batch: int, count: LayerCount) -> None:
        self.layers.append(count)
        self.macs += batch * count.macs
        self.dense_macs += batch * count.dense_macs

    def __str__(self) -> str:
        tokens = self.tokens
        if not tokens:
            return "no forward yet"
        return f"{tokens[0]} -> {tokens[-1]} tokens, {self.ratio:.1%} of the multiply-adds over {self.images} images"
