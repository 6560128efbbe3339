"""The cases of `tersor bench kernels`, all of them: pytest kernels/benchmarks/bench_kernels.py --benchmark-only -k hadamard

The peers' group is in the root's pyproject.toml; whoever is absent is skipped by name (-rs). For ratios of contenders that take
turns, use the command.
"""

from tersor.kernels import bench

CASES = bench.cases()


def test_kernels(timed, case, contender):
    timed(case, contender)
