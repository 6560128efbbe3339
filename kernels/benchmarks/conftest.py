"""A test that takes `case` and `contender` runs for every contender of its module's CASES.

One thread, whose CPU time is measured: other work on the machine then shows as little as possible. Compare within a group.
"""

import time

import pytest
import torch

from tersor.kernels.bench.peers import AbsentPeer


def pytest_generate_tests(metafunc):
    if "contender" not in metafunc.fixturenames:
        return
    metafunc.parametrize(
        ("case", "contender"),
        [
            pytest.param(
                case,
                contender,
                id=f"{case.name}-{contender}",
                marks=pytest.mark.benchmark(
                    group=case.name,
                    timer=time.process_time,
                    min_rounds=5,
                    max_time=0.5,
                    warmup=True,
                    warmup_iterations=1,
                    disable_gc=True,
                ),
            )
            for case in metafunc.module.CASES
            for contender in case.contenders
        ],
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def timed(benchmark):
    """Times one contender of a case; one that is not installed is skipped by name."""

    def run(case, contender):
        try:
            with torch.no_grad():
                call = case.contenders[contender]()
                result = benchmark(call)
        except AbsentPeer as error:
            pytest.skip(str(error))
        if contender in case.bars:
            benchmark.extra_info["bar"] = case.bars[contender]
        if case.size:
            benchmark.extra_info["size"] = case.size(result)

    return run
