"""Fixed intervals."""

from dataclasses import dataclass

from tersor.diffcache.clock import Signals


@dataclass(frozen=True)
class Interval:
    """Compute steps 0 ... warmup - 1, then warmup, warmup + n, warmup + 2 n, ...: warmup + ceil((T - warmup) / n) of T.

    Source: arXiv:2407.01425, section 3 (without warm-up: steps 0, n, 2 n, ...). A context that was away for some
    steps (guidance switched off for a while) is computed when its feature is n steps old, whatever the grid says.

    Args:
        n: steps from one computed step to the next; 1 computes every step.
        warmup: first steps that are all computed. Off by default, as in FORA.
    """

    n: int = 3
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; 1 computes every step")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")

    def decide(self, signals: Signals) -> bool:
        """True if this step is to be computed."""
        step = signals.tick.step
        return step < self.warmup or (step - self.warmup) % self.n == 0 or step - signals.last_computed >= self.n
