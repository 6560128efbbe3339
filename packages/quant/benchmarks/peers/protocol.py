"""What a benchmark asks of another library: `quantise(model, calibration, bits, group_size) -> Decoded`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Decoded(NamedTuple):
    weights: dict[str, Tensor]  # (out, in), by the name of the linear
    # codes at their bits, scales and zero points as the library's checkpoints hold them; no padding, no orders of columns
    bits_per_weight: float


def body(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules in the place of the linears of the decoder's blocks, by name."""
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj"):
            yield name, linear


def refuse(library: str, bits: int, possible: tuple[int, ...]) -> None:
    """
    Raises:
        NotImplementedError: the library has no grid of so many bits.
    """
    if bits not in possible:
        raise NotImplementedError(f"{library} has no {bits} bits, only {', '.join(map(str, possible))}")
