"""`tersor quantize` and `tersor export`, on the shipped model."""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tersor.integration import cli, evaluation, models, squeeze, texts, zoo
from tersor.integration import quantize as command
from tersor.integration.errors import UserError
from tersor.integration.plan import Plan
from tersor.quant import recipes
from tersor.quant.linear import bits_per_weight
from tersor.quant.stream import quantize_checkpoint

COMMAND = [sys.executable, "-c", "from tersor.integration.cli import main; main()"]
SMALL = ["--calibration-tokens", "4096", "--eval-tokens", "2048", "--json"]
GPTQ = ["quantize", "tiny-lm", "--recipe", "gptq", "--bits", "3", "--set.order", "none", "--keep", "o_proj"]


class Stopped(Exception):
    pass


def quiet(*_: object) -> None:
    pass


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


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
    after = report["bytes"]["after"]
    assert layers == sum(nbytes for name, nbytes in after.items() if name not in ("embeddings", "kept"))
    assert after["embeddings"] == models.stored_nbytes(folder)["model.embed_tokens.weight"]


def test_every_layer_that_was_not_kept_tells_its_error(quantised):
    folder, report = quantised
    model = models.load(folder)
    names = {name for name, module in model.named_modules() if hasattr(module, "weight_shape")}
    assert report["layers"].keys() == names
    assert not any(name.endswith("o_proj") for name in names)
    assert all(0 < layer["relative_error"] < 0.2 for layer in report["layers"].values())
    assert report["bits_per_weight"] == bits_per_weight(model)


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
    after = dict(report["bytes"]["after"])
    assert after.pop("embeddings") + after.pop("kept") == estimated["other_nbytes"]
    assert after == estimated["nbytes"]
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


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "real"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "gtpq"], 'did you mean "gptq"'),
        (["--recipe", "rtn", "--set.order", "none"], "'rtn' has no setting 'order'"),
        (["--recipe", "rtn", "--bits", "9"], "bits must be 1 to 8, got 9"),
        (["--calibration", "nowhere.txt"], "text file nowhere.txt does not exist"),
        (["--keep", "p_roj", "--recipe", "rtn"], "keep names 'p_roj'"),
        (["--recipe", "awq", "--pad"], "ActScale would round weights before they are padded"),
        (["--recipe", "rtn", "--group-size", "96"], "add 32 columns of zeros"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tersor, tmp_path, arguments, message, dry_run):
    done = tersor("quantize", "tiny-lm", *arguments, "--out", tmp_path / "out", *dry_run)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["calibration", "text"])
def test_a_short_text_is_noticed_before_any_work(tersor, tmp_path, which, monkeypatch):
    monkeypatch.setattr(command, "run_apart", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "short.txt").write_text("Too short.")
    done = tersor("quantize", "tiny-lm", "--recipe", "gptq", f"--{which}", "short.txt", "--out", "out")
    assert done.returncode == 2
    assert "fewer than one window of" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("name", ["quantize", "squeeze"])
def test_several_processes_are_refused(tersor, tmp_path, name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = tersor(name, "tiny-lm", "--out", "out")
    assert done.returncode == 2
    assert "WORLD_SIZE is 2" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["calibration", "text"])
@pytest.mark.parametrize("name", ["quantize", "squeeze"])
def test_a_changed_text_is_another_job(tmp_path, name, which, monkeypatch):
    jobs = []
    for module in (command, squeeze):
        monkeypatch.setattr(module, "done_before", lambda out, job, overwrite: jobs.append(job) or {"done": True})
    text = tmp_path / "text.txt"

    def run(words: str) -> None:
        text.write_text(words)
        chosen = {which: str(text)}
        if name == "quantize":
            command.quantize("tiny-lm", {"recipe": "rtn"}, tmp_path / "out", command.Options(**chosen), quiet)
        else:
            squeeze.squeeze("tiny-lm", Plan.load("fast"), tmp_path / "out", squeeze.Options(**chosen), quiet)

    for words in ("one text", "one text", "another text"):
        run(words)
    assert jobs[0] == jobs[1] != jobs[2]


def test_a_run_stopped_at_its_last_act_is_finished_by_the_next(small_model, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped

    def run() -> dict:
        options = command.Options(eval_tokens=1024)
        return command.quantize(str(small_model), {"recipe": "rtn", "bits": 4}, tmp_path / "out", options, quiet)

    with monkeypatch.context() as patched:
        patched.setattr(command, "publish", stopped)
        with pytest.raises(Stopped):
            run()
    monkeypatch.setattr(command, "run_apart", lambda *_, **__: pytest.fail("work was done again"))
    assert run() == json.loads((tmp_path / "out" / "report.json").read_text())
    assert not (tmp_path / "out" / "quantised.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    folder = shutil.copytree(quantised[0], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text("{}")
    done = tersor("export", folder, "--format", "gptq", "--out", "exported")
    assert done.returncode == 0, done.stderr
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    config = exported["quantization_config"]
    assert (config["quant_method"], config["bits"]) == ("gptq", 3)
    assert exported["dtype"] == json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors_in(tmp_path / "exported")[name], tensors_in(zoo.path("tiny-lm"))[name])
    assert tensors_in(tmp_path / "exported")[name].dtype == torch.bfloat16
    assert (tmp_path / "exported" / "preprocessor_config.json").is_file()
    other = tersor("export", folder, "--format", "awq", "--out", "other")
    assert other.returncode == 2
    assert not (tmp_path / "other").exists()


def test_a_processor_is_saved_with_the_model(tmp_path):
    source = shutil.copytree(zoo.path("tiny-lm"), tmp_path / "source")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (source / name).write_text("{}")
    models.save(models.load(source), source, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*processor*")} == {
        "processor_config.json",
        "preprocessor_config.json",
    }
    assert tensors_in(tmp_path / "saved").keys() == tensors_in(source).keys()


def test_a_dry_run_downloads_no_weights(tersor, monkeypatch):
    patterns = []

    def download(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(zoo.path("tiny-lm"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    done = tersor("quantize", "owner/name", "--recipe", "rtn", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert any(fnmatch("config.json", pattern) for pattern in patterns)
    assert not any(fnmatch("model.safetensors", pattern) for pattern in patterns)
    models.locate("owner/name")
    assert any(fnmatch("model.safetensors", pattern) for pattern in patterns)


def test_the_printed_table_says_when_errors_are_those_before_tuning(quantised, capsys, monkeypatch):
    folder, report = quantised
    monkeypatch.setenv("COLUMNS", "200")
    cli._print_quantized(report, folder)
    assert "before tuning" not in capsys.readouterr().out
    cli._print_quantized(report | {"tuned": True}, folder)
    printed = capsys.readouterr().out
    assert "relative error before tuning" in printed
    assert f"{report['bits_per_weight']:.3f} bits per weight" in printed


def stream(out: Path, progress: command.Progress) -> dict[str, Any]:
    """tiny-lm by GPTQ in 4 bits, without its o_proj."""
    settings = {"recipe": "gptq", "bits": 4, "group_size": 64}
    options = command.Options(calibration_tokens=4096, keep=("o_proj",), stream=True)
    return command.quantize("tiny-lm", settings, out, options, progress)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "out"
    return folder, stream(folder, quiet)


def test_a_streamed_model_is_that_of_the_library(streamed, tmp_path):
    folder, _ = streamed
    source = zoo.path("tiny-lm")
    rows = evaluation.windows(models.load_tokenizer(source), texts.calibration(None), 4096, 512)
    quantize_checkpoint(source, tmp_path / "direct", recipes.gptq(4, 64), rows, keep=["o_proj"])
    ours, direct = tensors_in(folder), tensors_in(tmp_path / "direct")
    assert ours.keys() == direct.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in direct.items())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_the_report_of_a_streamed_model_holds_its_sizes_and_no_comparison(streamed, capsys):
    folder, report = streamed
    assert report == json.loads((folder / "report.json").read_text())
    model = models.load(folder)
    layers = {name: module.nbytes for name, module in model.named_modules() if hasattr(module, "weight_shape")}
    assert {name: layer["nbytes"] for name, layer in report["layers"].items()} == layers
    assert all(layer["relative_error"] is None for layer in report["layers"].values())
    assert report["bits_per_weight"] == bits_per_weight(model)
    assert sum(report["bytes"]["after"].values()) == models.tensor_nbytes(folder)
    assert report["bytes"]["after"]["embeddings"] == tensors_in(folder)["model.embed_tokens.weight"].nbytes
    assert [report[key] for key in ("perplexity", "divergence", "flips")] == [None] * 3
    cli._print_quantized(report, folder)
    assert "not compared with the original" in capsys.readouterr().out


def test_a_streamed_model_goes_on_where_it_was_stopped(streamed, tmp_path):
    folder, report = streamed
    seen = []

    def stop_in_the_second_block(done: int, total: int, name: str) -> None:
        if ".layers.1." in name:
            raise Stopped

    with pytest.raises(Stopped):
        stream(tmp_path / "out", stop_in_the_second_block)
    assert not (tmp_path / "out").exists()
    again = stream(tmp_path / "out", lambda done, total, name: seen.append(name))
    assert 0 < len(seen) < len(report["layers"])
    assert not any(".layers.0." in name for name in seen)
    assert all(again[key] == report[key] for key in ("bytes", "layers", "bits_per_weight"))
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (tmp_path / "out", folder)]
    for of_one in files:
        del of_one["report.json"]  # its times differ
    assert files[0] == files[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_needs_the_whole_model_is_not_streamed(tersor, tmp_path):
    with pytest.raises(UserError, match="needs all blocks at once") as refused:
        tersor("quantize", "tiny-lm", "--recipe", "quarot", "--stream", "--out", "out", "--debug")
    assert "Traceback" in str(refused.value.__cause__), "of the process apart"
    assert list(tmp_path.iterdir()) == []


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
