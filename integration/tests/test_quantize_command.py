"""`tersor quantize` and `tersor export`, on the shipped model."""

import json
import subprocess
import sys

import pytest
import torch

from tersor.integration import evaluation, models, texts, zoo
from tersor.integration.errors import UserError

COMMAND = [sys.executable, "-c", "from tersor.integration.cli import main; main()"]
SMALL = ["--calibration-tokens", "4096", "--eval-tokens", "2048", "--json"]
GPTQ = ["quantize", "tiny-lm", "--recipe", "gptq", "--bits", "3", "--set.order", "none", "--keep", "o_proj"]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """tiny-lm in 3 bits: the folder and the printed report."""
    folder = tmp_path_factory.mktemp("quantize")
    done = subprocess.run([*COMMAND, *GPTQ, *SMALL, "--out", "small"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "small", json.loads(done.stdout)


def test_the_report_is_what_was_printed_and_nothing_else_is_left(quantised):
    folder, report = quantised
    assert report == json.loads((folder / "report.json").read_text())
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    assert report["recipe"] == {"recipe": "gptq", "bits": 3, "order": "none"}


def test_bytes_by_component_add_up_to_those_of_the_file(quantised):
    folder, report = quantised
    assert sum(report["bytes"]["after"].values()) == models.tensor_nbytes(folder)
    layers = sum(layer["nbytes"] for layer in report["layers"].values())
    assert layers == sum(nbytes for name, nbytes in report["bytes"]["after"].items() if name != "kept")


def test_every_layer_that_was_not_kept_tells_its_error(quantised):
    folder, report = quantised
    model = models.load(folder)
    names = {name for name, module in model.named_modules() if hasattr(module, "weight_shape")}
    assert report["layers"].keys() == names
    assert not any(name.endswith("o_proj") for name in names)
    assert all(0 < layer["relative_error"] < 0.2 for layer in report["layers"].values())


def test_three_bits_lose_something_but_not_much(quantised):
    _, report = quantised
    assert 1 < report["perplexity"]["after"] / report["perplexity"]["before"] < 1.2
    assert 0 < report["divergence"] < 0.2
    assert 0 < report["flips"] < 0.3
    assert report["seconds"] > 0


def test_a_dry_run_tells_the_bytes_beforehand(quantised, tersor):
    _, report = quantised
    done = tersor(*GPTQ, *SMALL, "--dry-run")
    assert done.returncode == 0, done.stderr
    estimated = json.loads(done.stdout)
    assert estimated["nbytes"] | {"kept": estimated["other_nbytes"]} == report["bytes"]["after"]
    assert estimated["original_nbytes"] + estimated["other_nbytes"] == report["bytes"]["before"]
    assert estimated["seconds"] > 0


def test_the_same_command_again_returns_what_is_there(quantised, tersor, monkeypatch):
    folder, report = quantised
    monkeypatch.chdir(folder.parent)
    before = (folder / "report.json").stat().st_mtime_ns
    done = tersor(*GPTQ, *SMALL, "--out", "small")
    assert json.loads(done.stdout) == report
    assert (folder / "report.json").stat().st_mtime_ns == before
    other = tersor("quantize", "tiny-lm", "--recipe", "rtn", "--out", "small")
    assert other.returncode == 2
    assert "small exists already" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "gtpq"], 'did you mean "gptq"'),
        (["--recipe", "rtn", "--set.order", "none"], "'rtn' has no setting 'order'"),
        (["--recipe", "rtn", "--bits", "9"], "bits must be 1 to 8, got 9"),
        (["--calibration", "nowhere.txt"], "text file nowhere.txt does not exist"),
        (["--keep", "p_roj", "--recipe", "rtn"], "keep names 'p_roj'"),
        (["--recipe", "awq", "--pad"], "ActScale would round weights before they are padded"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tersor, tmp_path, arguments, message):
    done = tersor("quantize", "tiny-lm", *arguments, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_groups_that_divide_nothing_are_padded_on_demand(tersor):
    """256 and 768 inputs in groups of 96."""
    command = ["quantize", "tiny-lm", "--recipe", "rtn", "--group-size", "96", "--dry-run", "--json"]
    refused = tersor(*command)
    assert refused.returncode == 2
    assert "add 32 columns of zeros" in refused.stderr
    done = tersor(*command, "--pad")
    assert done.returncode == 0, done.stderr
    assert 4.2 < json.loads(done.stdout)["bits_per_weight"] < 4.8


def test_an_export_holds_the_weights_of_the_model(quantised, tersor, tmp_path):
    folder, _ = quantised
    done = tersor("export", folder, "--format", "gptq", "--out", "exported")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "exported" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"]) == ("gptq", 3)
    other = tersor("export", folder, "--format", "awq", "--out", "other")
    assert other.returncode == 2
    assert not (tmp_path / "other").exists()


def test_a_model_against_itself_loses_nothing():
    model, tokenizer = zoo.load("tiny-lm")
    rows = evaluation.windows(tokenizer, texts.held_out(None), 512, 128)
    same = evaluation.compare(model, model, rows)
    assert same.perplexities[0] == same.perplexities[1] == pytest.approx(evaluation.read(model, rows).perplexity)
    assert (same.divergence, same.flips) == (0, 0)


def test_the_comparison_is_that_of_the_formulas():
    model, tokenizer = zoo.load("tiny-lm")
    rows = evaluation.windows(tokenizer, texts.held_out(None), 256, 128)
    other, _ = zoo.load("tiny-lm")
    torch.nn.init.normal_(other.model.norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    found = evaluation.compare(model, other, rows)
    with torch.no_grad():
        p, q = (m(rows).logits[:, :-1].log_softmax(-1) for m in (model, other))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert found.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert found.flips == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    assert found.perplexities[1] == pytest.approx(evaluation.read(other, rows).perplexity)


def test_texts_are_files_or_data_sets(tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    assert texts.calibration(str(tmp_path / "text.txt")) == texts.held_out(str(tmp_path / "text.txt")) == "a text"
    with pytest.raises(UserError, match='did you mean "prose"'):
        texts.check("prosa")
