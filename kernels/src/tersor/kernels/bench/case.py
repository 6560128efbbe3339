"""What is compared: an op at one size, and all that does the same."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tersor.kernels.dispatch import backend

Call = Callable[[], object]
Prepare = Callable[[], Call]  # draws, packs and compiles; returns the call that is timed

OURS = "ours"
READING = "reading"  # the bytes that ours must read, at the read bandwidth of the same run

# more than the last cache of most processors holds: a call then finds its weights in memory, as in a model
COLD_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Case:
    """An op at one size, its contenders, and how far ahead of them we want to be.

    Args:
        op, shape: what is computed, and on how much; together the name.
        nbytes: bytes that ours must read at least; those of the original numbers for coders.
        contenders: name -> what prepares it; "ours" is among them.
        bars: contender, rate or "reading" -> least ratio of its time to ours.
        rates: name -> bytes per second of what ours is compared with, but is not measured beside it.
        size: of a call's result, its bytes over the original's: for encoders.
    """

    op: str
    shape: str
    nbytes: int
    contenders: Mapping[str, Prepare]
    bars: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    size: Callable[[object], float] | None = None

    def __post_init__(self) -> None:
        if OURS not in self.contenders:
            raise ValueError(f"{self.name}: no contender is {OURS!r}, there are {', '.join(self.contenders)}")
        if unknown := self.bars.keys() - self.contenders.keys() - self.rates.keys() - {READING}:
            raise ValueError(f"{self.name}: bars name {', '.join(sorted(unknown))}, which is no contender and no rate")

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"


def num_copies(nbytes: int) -> int:
    """So many of them exceed every cache."""
    return 2 + COLD_BYTES // nbytes


def copies(*tensors: Tensor) -> Iterator[Any]:
    """Lists of as many tensors: copies that together exceed every cache, round and round."""
    count = num_copies(sum(tensor.nbytes for tensor in tensors))
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(count)])


def on(draw: Callable[[], tuple[Any, ...]], function: Callable[..., object]) -> Prepare:
    """`function` of inputs that are drawn once."""
    return lambda: partial(function, *draw())


def ours(prepare: Prepare) -> Prepare:
    """With a call that the CPU body has served once: one that it declines raises here, and does not pass for a slow one."""

    def prepared() -> Call:
        call = prepare()
        with backend("cpu"):
            call()
        return call

    return prepared


def reference(prepare: Prepare) -> Prepare:
    """With a call that the references serve."""

    def prepared() -> Call:
        call = prepare()

        def run() -> object:
            with backend("reference"):
                return call()

        return run

    return prepared
