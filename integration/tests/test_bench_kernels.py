import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tersor.kernels import bench
from tersor.kernels.bench import coding, linear, timing


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Cases that take no time, and none of the peers that only the group `peers` brings."""
    cases = [*linear.cases(n=128), *coding.cases(n=64, block=2**10)]
    monkeypatch.setattr(bench, "cases", lambda: cases)
    monkeypatch.setattr("tersor.kernels.bench.case.COLD_BYTES", 0)
    monkeypatch.setattr(timing, "READ_BYTES", 2**16)
    for module in ("bitsandbytes", "optimum.quanto", "zipnn"):
        monkeypatch.setitem(sys.modules, module, None)


def measured(tersor, *arguments):
    done = tersor("bench", "kernels", "--seconds", "0.01", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_json_says_with_what_and_beside_whom_it_was_measured(tersor):
    report, _ = measured(tersor, "--only", "lookup_linear 4 bits, 1 x", "--clock", "cpu")
    assert report.keys() == {"machine", "versions", "clock", "threads", "read_gb_per_s", "cases"}
    assert (report["clock"], report["threads"]) == ("cpu", 1)
    (case,) = report["cases"]
    assert (case["op"], case["shape"]) == ("lookup_linear 4 bits", "1 x 128 x 128")
    rivals = {rival["name"]: rival for rival in case["rivals"]}
    assert rivals.keys() == {"reading", "dequantise", "ATen int4", "linear float32", "linear bfloat16"}
    for rival in rivals.values():
        assert rival["ratio"] == pytest.approx(rival["us"] / case["us"])
        assert rival["met"] == (None if rival["bar"] is None else rival["ratio"] >= rival["bar"])
    assert rivals["ATen int4"]["bar"] == 1.25
    assert rivals["reading"]["ratio"] == case["share_of_read_bandwidth"]
    assert case["gb_per_s"] == pytest.approx(case["share_of_read_bandwidth"] * report["read_gb_per_s"])


def test_absent_peers_are_named_with_the_command_that_installs_them(tersor):
    report, said = measured(tersor, "--only", "int8_linear, channels, 1 x")
    assert report["cases"][0]["absent"].keys() == {"bitsandbytes int8", "optimum-quanto qint8"}
    assert "without bitsandbytes int8: bitsandbytes cannot be imported" in said
    assert "uv sync --all-packages --group peers" in said


def test_peers_that_are_installed_take_part(tersor, monkeypatch):
    class Linear4bit(torch.nn.Linear):
        def __init__(self, n, out, bias, compute_dtype, quant_type):
            assert quant_type == "nf4"
            super().__init__(n, out, bias, dtype=compute_dtype)

    fake = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    report, said = measured(tersor, "--only", "lookup_linear nf4, 1 x")
    (case,) = report["cases"]
    assert {"name": "bitsandbytes nf4", "bar": 0.95}.items() <= case["rivals"][2].items()
    assert case["absent"] == {}
    assert "without" not in said


def test_coders_have_a_size(tersor):
    report, _ = measured(tersor, "--only", "rans11, encode")
    (case,) = report["cases"]
    assert 0 < case["size"] < 1
    assert {rival["name"]: rival["size"] for rival in case["rivals"]}["copy"] == 1


def test_by_default_every_bar_is_in_the_table(tersor, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = torch.get_num_threads()
    done = tersor("bench", "kernels", "--seconds", "0.01", "--threads", "2")
    assert done.returncode == 0, done.stderr
    assert torch.get_num_threads() == before
    with_bar = [case for case in bench.cases() if case.bars]
    assert all(case.op in done.stdout for case in with_bar)
    assert "bipolar_linear" not in done.stdout
    assert "wall time, threads: 2" in done.stdout


def test_unknown_pattern_offers_the_near_op(tersor):
    done = tersor("bench", "kernels", "--only", "lokup_linear nf4")
    assert done.returncode == 2
    assert "no case matches 'lokup_linear nf4'; did you mean \"lookup_linear nf4\"?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--seconds", "-1"), "--seconds must not be negative, got -1.0"),
        (("--clock", "sun"), "sun"),
    ],
)
def test_bad_options_are_refused_at_once(tersor, monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "read_bandwidth", lambda *_: pytest.fail("nothing may be measured"))
    done = tersor("bench", "kernels", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_help_imports_nothing_heavy():
    program = """
import sys
from tersor.integration.cli import app
app(["bench", "kernels", "--help"], result_action="return_value")
assert not {"torch", "numpy", "numba"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--clock" in done.stdout
