"""The main job from end to end."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tersor.integration import models
from tersor.integration.errors import UserError

COMMAND = [sys.executable, "-c", "from tersor.integration.cli import main; main()"]

REPORT_KEYS = {"model", "plan", "before", "after", "agreement", "versions", "hardware"}
SIDE_KEYS = {"disk_bytes", "weight_bytes", "kv_bytes_per_token", "peak_rss_bytes", "perplexity", "tokens_per_second"}


SMALL = ["--calibration-tokens", "4096", "--eval-tokens", "2048", "--new-tokens", "16"]


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """tiny-lm under the default plan, measured on less text than usual: the folder and the printed report."""
    folder = tmp_path_factory.mktemp("squeeze")
    command = [*COMMAND, "squeeze", *SMALL, "--out", "small", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "small", json.loads(done.stdout)


def test_report_has_every_key_and_is_what_was_printed(squeezed):
    folder, report = squeezed
    assert report == json.loads((folder / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["before"].keys() >= SIDE_KEYS
    assert report["after"].keys() >= SIDE_KEYS


def test_everything_that_should_shrink_shrinks(squeezed):
    _, report = squeezed
    before, after = report["before"], report["after"]
    assert after["disk_bytes"] < 0.5 * before["disk_bytes"]
    assert after["weight_bytes"] < 0.5 * before["weight_bytes"]
    assert after["kv_bytes_per_token"] < before["kv_bytes_per_token"]


def test_quality_survives(squeezed):
    """4 bits with GPTQ cost a few percent; a broken scale, order or cache costs orders of magnitude."""
    _, report = squeezed
    before, after = report["before"], report["after"]
    assert after["perplexity"] < 1.10 * before["perplexity"]
    assert after["perplexity_through_cache"] < 1.15 * before["perplexity_through_cache"]
    assert report["agreement"] > 0.75
    assert report["decoding"]["exact"]


def test_linears_take_at_most_30_percent_of_bf16(squeezed):
    from tersor.quant.linear import QuantizedLinear

    model = models.load(squeezed[0])
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    dense = sum(2 * m.weight_shape[0] * m.weight_shape[1] for m in linears)
    assert sum(m.nbytes for m in linears) <= 0.30 * dense


def test_weight_bytes_are_the_tensors_in_the_files(squeezed):
    from safetensors.torch import load_file

    folder, report = squeezed
    tensors = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    assert sum(t.nbytes for t in tensors) == report["after"]["weight_bytes"]


def test_a_new_process_with_plain_transformers_gives_the_same_perplexity_to_the_last_digit(squeezed):
    folder, report = squeezed
    program = f"""
import torch, tersor.quant
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from tersor.integration import evaluation, zoo
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
text = zoo.held_out_text()
print(repr(evaluation.read(model, evaluation.windows(tokenizer, text, 2048, 512)).perplexity))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(printed.split()[-1]) == report["after"]["perplexity"]


def test_the_archive_holds_the_model_byte_for_byte(squeezed, tersor, tmp_path):
    folder, _ = squeezed
    done = tersor("unpack", folder / "model.tersor", "restored")
    assert done.returncode == 0, done.stderr
    ours = {"model.tersor", "report.json", "report.html"}
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ours}
    assert {p.name: p.read_bytes() for p in (tmp_path / "restored").iterdir()} == files


def test_page_needs_neither_network_nor_scripts(squeezed):
    page = (squeezed[0] / "report.html").read_text()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', page) == []
    assert page.count("<svg") >= 4
    for sample in squeezed[1]["prompts"]:
        assert len(sample["texts"]) == 2


def test_a_second_run_says_that_it_is_done(squeezed, tersor):
    folder, report = squeezed
    again = tersor("squeeze", *SMALL, "--out", folder, "--json")
    assert again.returncode == 0
    assert "done already" in again.stderr
    assert json.loads(again.stdout) == report


def test_an_output_of_another_job_is_kept(squeezed, tersor):
    folder, _ = squeezed
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    other = tersor("squeeze", *SMALL, "--plan", "fast", "--out", folder)
    assert other.returncode == 2
    assert "exists already" in other.stderr
    assert "--overwrite" in other.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-ml"], 'did you mean "tiny-lm"'),
        (["--plan", "defalt"], 'did you mean "default"'),
        (["--plan", "nowhere.toml"], "nowhere.toml does not exist"),
        (["--eval-tokens", "0"], "eval_tokens must be at least 2, got 0"),
        (["--eval-tokens", "many"], "many"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--ouput", "x"], "--out"),
        (["."], "holds no config.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tersor, tmp_path):
    done = tersor("squeeze", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tersor):
    with pytest.raises(UserError, match='did you mean "tiny-lm"'):
        tersor("squeeze", "tiny-ml", "--debug")


def test_no_space_left_is_said_before_any_work(tmp_path, monkeypatch):
    import shutil

    from tersor.integration import squeeze
    from tersor.integration.plan import Plan

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="no space left"):
        squeeze.squeeze("tiny-lm", Plan.load("fast"), tmp_path / "out", squeeze.Options(), lambda *state: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_squeeze_leaves_nothing_or_all_and_a_rerun_succeeds(small_model, tmp_path, kills):
    options = ["--plan", "fast", "--eval-tokens", "1024", "--new-tokens", "4", "--out", "out", "--json"]
    arguments = [*COMMAND, "squeeze", str(small_model), *options]
    start = time.monotonic()
    subprocess.run([*arguments[:-2], "whole", "--json"], cwd=tmp_path, check=True, capture_output=True)
    usual = time.monotonic() - start
    moments = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0, usual))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "out").exists():
            assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert not list(tmp_path.glob(".out*")), "the work folder is gone"
    assert json.loads(done.stdout)["after"]["perplexity"] > 1


def test_interrupting_says_how_to_go_on(small_model, tmp_path):
    # a job in the background would ignore the signal
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    arguments = [sys.executable, "-c", listen + COMMAND[-1], "squeeze", str(small_model), "--out", "out"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / ".out.partial/job.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
