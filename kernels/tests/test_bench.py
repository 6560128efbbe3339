"""What `tersor bench kernels` and the benchmarks measure, at sizes that take no time."""

import itertools
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from tersor.kernels import bench, lookup_linear
from tersor.kernels.bench import attention, coding, linear, peers, selection, timing, transforms
from tersor.kernels.bench.case import OURS, Case, copies, num_copies, ours

TINY = [
    *linear.cases(n=128),
    *attention.cases((32, 64, 128)),
    *transforms.cases(n=256, num_codes=2**12),
    *coding.cases(n=64, block=2**10),
    *selection.cases(tokens=64),
]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("tersor.kernels.bench.case.COLD_BYTES", 0)


class Clock:
    """Time passes in calls alone: `clock.taking(3)` is one of 3 seconds."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float):
        """Each of the durations in turn."""
        turn = itertools.cycle(seconds)

        def call():
            taken = next(turn)
            self.now += taken
            self.called.append(taken)

        return lambda: call


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_default_dtype_is_no_concern_of_an_op(case, dtype, small):
    """Models are made and run under one of their own: what a body allocates must not follow it."""

    def prepared():
        torch.manual_seed(0)
        return case.contenders[OURS]()

    (expected, _), call = pytree.tree_flatten(prepared()()), prepared()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found, _ = pytree.tree_flatten(call())
    finally:
        torch.set_default_dtype(before)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_every_case_has_a_name_of_its_own():
    for cases in (bench.cases(), TINY):
        assert max(Counter(case.name for case in cases).values()) == 1


def test_every_contender_that_is_installed_runs(small):
    for case in TINY:
        for prepare in case.contenders.values():
            try:
                prepare()()
            except peers.AbsentPeer:
                continue


def test_contenders_of_linear_layers_return_the_same_shape(small):
    for case in linear.cases(n=128):
        rows, n, _ = map(int, case.shape.split(" x "))
        for name, prepare in case.contenders.items():
            try:
                call = prepare()
            except peers.AbsentPeer:
                continue
            with torch.no_grad():
                assert call().shape == (rows, n), (case.name, name)


@pytest.mark.parametrize("case", coding.cases(n=64, block=2**10)[:10:2], ids=lambda case: case.name)
def test_sizes_of_coders_are_fractions_of_the_original(case):
    sizes = {name: case.size(case.contenders[name]()()) for name in ("ours", "planes alone", "copy")}
    assert sizes["copy"] == sizes["planes alone"] == 1
    assert 0 < sizes["ours"] < 1


def test_bytes_of_linear_cases_are_those_of_the_weights(small, monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear, "copies", lambda *tensors: seen.append(sum(t.nbytes for t in tensors)) or copies(*tensors)
    )
    for case in linear.cases(n=128):
        if "vector" not in case.op:
            seen.clear()
            case.contenders["ours"]()
            assert seen == [case.nbytes], case.name


def test_a_bar_without_a_contender_is_refused():
    with pytest.raises(ValueError, match="op, shape: bars name llama"):
        Case("op", "shape", 1, {"ours": lambda: None}, {"llama": 1.0, "reading": 0.8})


def test_a_case_needs_ours():
    with pytest.raises(ValueError, match="no contender is 'ours', there are copy"):
        Case("op", "shape", 1, {"copy": lambda: None})


def test_copies_exceed_the_cache_and_are_distinct(monkeypatch):
    monkeypatch.setattr("tersor.kernels.bench.case.COLD_BYTES", 1000)
    turn = copies(torch.zeros(25), torch.ones(25))
    round = list(itertools.islice(turn, num_copies(200)))
    addresses = {tensor.data_ptr() for tensors in round for tensor in tensors}
    assert len(addresses) == 2 * len(round)
    assert 200 * len(round) > 1000
    assert next(turn) is round[0]


def test_ours_must_be_served_by_the_cpu_body():
    weights = torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(16), torch.ones(8, 1), 4, 64
    with pytest.raises(NotImplementedError, match="the cpu body is forced, but declines: float64"):
        ours(lambda: lambda: lookup_linear(torch.ones(64, dtype=torch.float64), *weights))()


def test_ratios_are_the_others_times_over_ours(clock):
    contenders = {"ours": clock.taking(2.0), "rival": clock.taking(3.0), "other": clock.taking(1.0)}
    bars = {"rival": 1.5, "reading": 0.8}
    result = bench.race(Case("op", "shape", 6, contenders, bars, {"table": 1.0}), 4.0, 0.0, clock)
    assert (result.seconds, result.rate) == (2.0, 3.0)
    assert [(rival.name, rival.ratio, rival.met) for rival in result.rivals] == [
        ("reading", 0.75, False),
        ("table", 3.0, None),
        ("rival", 1.5, True),
        ("other", 0.5, None),
    ]


def test_times_are_lower_quartiles_without_the_first_call(clock):
    result = bench.race(Case("op", "shape", 1, {"ours": clock.taking(0.25, 5.0, 4.0, 3.0, 2.0)}), 1.0, 13.0, clock)
    assert result.seconds == 3.0


def test_contenders_take_turns(clock):
    bench.race(Case("op", "shape", 1, {"ours": clock.taking(1.0), "rival": clock.taking(2.0)}), 1.0, 12.0, clock)
    assert clock.called == [1.0, 2.0] * 5


def test_short_calls_are_timed_often_in_a_turn(clock):
    short = 2**-10
    assert 2 * short < timing.TURN < 3 * short
    bench.race(Case("op", "shape", 1, {"ours": clock.taking(short), "rival": clock.taking(1.0)}), 1.0, 2.0, clock)
    assert clock.called == [short, 1.0] + [short, short, short, 1.0] * 3


def test_a_call_that_takes_longer_than_the_case_has_one_turn(clock):
    bench.race(Case("op", "shape", 1, {"ours": clock.taking(1.0), "rival": clock.taking(99.0)}), 1.0, 10.0, clock)
    assert clock.called == [1.0, 99.0, 1.0, 99.0, 1.0, 1.0]  # one call each to compile, then turns


def test_an_absent_peer_is_named_with_the_way_out(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "zipnn", None)
    case = next(case for case in coding.cases(n=64, block=2**10) if "ZipNN" in case.contenders)
    case = Case("op", "shape", 1, {"ours": clock.taking(1.0), "ZipNN": case.contenders["ZipNN"]}, {"ZipNN": 3.0})
    result = bench.race(case, 1.0, 0.0, clock)
    assert [rival.name for rival in result.rivals] == ["reading"]
    assert result.absent.keys() == {"ZipNN"}
    assert "zipnn cannot be imported" in result.absent["ZipNN"]
    assert "pip install zipnn" in result.absent["ZipNN"]
    assert "--group peers" in result.absent["ZipNN"]


def test_the_dependency_group_holds_the_peers():
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["dependency-groups"]
    assert [requirement.split(">=")[0] for requirement in groups["peers"]] == list(peers.GROUP)


def test_read_bandwidth_is_the_best_of_the_passes(monkeypatch):
    monkeypatch.setattr(timing, "READ_BYTES", 2**13)
    moments = itertools.accumulate(itertools.chain.from_iterable((0, taken) for taken in (4, 2, 8) * 4))
    assert bench.read_bandwidth(lambda: float(next(moments))) == 2**12


def test_without_a_pattern_cases_with_a_bar_are_chosen():
    assert [case.name for case in bench.chosen()] == [case.name for case in bench.cases() if case.bars] != []
    assert len(bench.chosen("*")) == len(bench.cases())


def test_a_pattern_may_stand_anywhere_in_the_name():
    names = [case.name for case in bench.chosen("lookup*4 bits, 1 x")]
    assert names == ["lookup_linear 4 bits, 1 x 4096 x 4096"]
    assert bench.chosen("no such op") == []
