"""Our CPU bodies beside their peers: what `tersor bench kernels` and the benchmarks measure.

Each family of ops has its cases here, with the contenders of each: ours, the reference where a user would write the same,
torch's own ops, and other libraries where they are installed (dependency group `peers`). `race` times a case's contenders
in turn; weights are taken in turn from copies that no cache holds.

>>> [case.name for case in chosen("hadamard*bfloat16")]
['hadamard bfloat16, 64 x 4096']
"""

from fnmatch import fnmatchcase

from tersor.kernels.bench import attention, coding, linear, selection, transforms
from tersor.kernels.bench.case import Case
from tersor.kernels.bench.timing import CLOCKS, Result, Rival, race, read_bandwidth

__all__ = ["CLOCKS", "Case", "Result", "Rival", "cases", "chosen", "race", "read_bandwidth"]


def cases() -> list[Case]:
    """All cases of all families."""
    families = linear, attention, transforms, coding, selection
    return [case for family in families for case in family.cases()]


def chosen(pattern: str | None = None) -> list[Case]:
    """The cases whose name contains `pattern`, in which * and ? stand for anything; without one, those with a bar."""
    if pattern is None:
        return [case for case in cases() if case.bars]
    return [case for case in cases() if fnmatchcase(case.name, f"*{pattern}*")]
