"""Contenders take turns in one process, so that whatever else the machine does hits all of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tersor.kernels.bench.case import OURS, READING, Call, Case
from tersor.kernels.bench.peers import AbsentPeer

# `cpu` is for machines that others use, too: with one thread, waiting for a core then costs nothing
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

READ_BYTES = 2**29
TURN = 2e-3  # seconds: a short call is timed often in its turn, a long one once


class Rival(NamedTuple):
    """What ours was compared with."""

    name: str
    seconds: float
    ratio: float  # its time over ours
    bar: float | None
    size: float | None

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.ratio >= self.bar


@dataclass(frozen=True)
class Result:
    """Seconds per call: the lower quartile.

    Args:
        absent: contender -> why it could not take part.
    """

    case: Case
    seconds: float
    size: float | None
    rivals: list[Rival]
    absent: dict[str, str]

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.case.nbytes / self.seconds


def read_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes per second of a sum over 512 MB, the best of ten, with torch's threads."""
    # of torch's reductions, and Numba's, this one came closest to the memory's speed
    words = torch.ones(READ_BYTES // 8, dtype=torch.long)
    return words.nbytes / min(_time(words.sum, clock) for _ in range(10))


@torch.no_grad()
def race(case: Case, bandwidth: float, seconds: float, clock: Callable[[], float]) -> Result:
    """Time all of a case's contenders in turn, for so many seconds of `clock`.

    Each has at least three turns, but only one if a call of its takes longer than all that.
    """
    calls, absent = _prepared(case)
    results = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent, turns = 0.0, 0
    while spent < seconds or turns < 3:
        for name, call in calls.items():
            if turns == 0 or times[name][0] < seconds:
                taken = _turn(call, clock)
                times[name] += taken
                spent += sum(taken)
        turns += 1
    quartile = {name: sorted(taken)[len(taken) // 4] for name, taken in times.items()}
    sizes = {name: case.size(result) for name, result in results.items()} if case.size else {}
    unmeasured = {name: case.nbytes / rate for name, rate in ({READING: bandwidth} | dict(case.rates)).items()}
    mine = quartile.pop(OURS)
    rivals = [
        Rival(name, taken, taken / mine, case.bars.get(name), sizes.get(name))
        for name, taken in (unmeasured | quartile).items()
    ]
    return Result(case, mine, sizes.get(OURS), rivals, absent)


def _prepared(case: Case) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls, and why others are absent."""
    calls, absent = {}, {}
    for name, prepare in case.contenders.items():
        try:
            calls[name] = prepare()
        except AbsentPeer as error:
            absent[name] = str(error)
    return calls, absent


def _turn(call: Call, clock: Callable[[], float]) -> list[float]:
    taken = [_time(call, clock)]
    total = taken[0]
    while total < TURN:
        taken.append(_time(call, clock))
        total += taken[-1]
    return taken


def _time(call: Call, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
