"""A fixed number of tokens in each layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PerLayer:
    """r tokens in every layer; or, inflected, from r (1 - inflect) in the first layer to r (1 + inflect) in the last.

    Source: arXiv:2210.09461, section 4 and its appendix: (r, 0) is the constant, (r, -1) the decreasing schedule.
    Fractions are rounded down, so an inflected schedule may remove a few tokens less than the constant one.

    Args:
        r: tokens per layer, or a tuple with one number for each layer.
        inflect: -1 to 1.
    """

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0

    def __post_init__(self) -> None:
        if any(r < 0 for r in (self.r if isinstance(self.r, tuple) else (self.r,))):
            raise ValueError(f"r must not be negative, got {self.r}")
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect must be -1 to 1, got {self.inflect}")
        if isinstance(self.r, tuple) and self.inflect:
            raise ValueError(f"r = {self.r} already says how many per layer; leave out inflect = {self.inflect}")

    def plan(self, num_layers: int, num_tokens: int) -> tuple[int, ...]:
        if isinstance(self.r, tuple):
            if len(self.r) != num_layers:
                raise ValueError(f"r has {len(self.r)} numbers for {num_layers} layers; give one for each")
            return self.r
        first = int(self.r * (1 - self.inflect))
        last = 2 * self.r - first
        steps = max(num_layers - 1, 1)
        # whole numbers: a float step would round differently on its way to the last layer
        return tuple((first * (steps - i) + last * i) // steps for i in range(num_layers))
