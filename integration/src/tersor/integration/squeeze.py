"""The main job: a model and a plan in, a smaller model and an honest report out.

Everything is made in a hidden folder beside the target and renamed at the end, so the target is whole or absent.
Each stage leaves one file or folder there, itself renamed into place; a second run goes on after the last of them.
"""

import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.integration import hardware, models, zoo
from tersor.integration.errors import UserError
from tersor.integration.plan import Plan
from tersor.integration.worker import run_apart

Progress = Callable[[int, int, str], None]
PACKED = "model.tersor"
_PROMPT_TOKENS, _PROMPTS = 128, 3


@dataclass(frozen=True)
class Options:
    """How a squeeze calibrates and measures.

    Args:
        calibration: text file for calibration; None is the text that ships with tersor.
        text: text file for perplexity and agreement; None is the held-out text that ships with tersor.
        seq_len: tokens per window, for calibration and evaluation.
        new_tokens: tokens that each prompt is continued by when speed is measured.
    """

    calibration: str | None = None
    text: str | None = None
    calibration_tokens: int = 16384
    eval_tokens: int = 8192
    seq_len: int = 512
    new_tokens: int = 48

    def __post_init__(self) -> None:
        for name, least in {"calibration_tokens": 1, "eval_tokens": 2, "seq_len": 2, "new_tokens": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for path in (self.calibration, self.text):
            if path is not None and not Path(path).is_file():
                raise UserError(f"text file {path} does not exist")


def squeeze(
    model: str, plan: Plan, out: Path, options: Options, progress: Progress, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the squeezed model, its archive and `report.json`, `report.html` to `out`; return the report.

    Args:
        model: a shipped name, a directory or a hub id.
        progress: called with (done, total, what).
        overwrite: replace `out` if it exists. Otherwise an `out` that this very job has made is returned as it is.

    Raises:
        UserError: whatever the user can mend; nothing was changed then.
    """
    source = models.locate(model)
    job = {
        "model": model,
        "plan": {"name": plan.name, **plan.settings},
        "options": asdict(options),
        "source": _fingerprint(source),
    }
    if out.exists() and not overwrite:
        if (done := finished(out)) and done["job"] == job:
            return done
        raise UserError(f"{out} exists already; use --overwrite, or another --out")
    _need_space(source, out)
    work = _work_folder(out, job)
    try:
        report = _stages(source, plan, work, options, progress, job)
        _publish(work, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left beside {out}: free some, then run the same command to go on") from error
        raise
    return report


def finished(out: Path) -> dict[str, Any] | None:
    """The report of the job that made `out`; None if `out` is nothing of ours."""
    try:
        return json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return None


def _stages(
    source: Path, plan: Plan, work: Path, options: Options, progress: Progress, job: dict[str, Any]
) -> dict[str, Any]:
    result, text = work / "result", _texts(options)
    before = _remembered(
        work / "before.json", lambda: run_apart(measure, source, _PLAIN, text, options, progress=progress)
    )
    _made(result, lambda folder: _shrink(source, plan, folder, options, progress))
    after = _remembered(work / "after.json", lambda: run_apart(measure, result, plan, text, options, progress=progress))
    sizes = _remembered(work / "sizes.json", lambda: _pack(plan, result, work / PACKED, progress))
    runs = _remembered(
        work / "race.json",
        lambda: run_apart(compete, [(source, _PLAIN), (result, plan)], text, options, progress=progress),
    )
    report = {
        "model": job["model"],
        "plan": job["plan"],
        "before": _side(before, runs, 0) | {"disk_bytes": _folder_nbytes(source)},
        "after": _side(after, runs, 1) | sizes,
        "agreement": _share_equal(before["predicted"], after["predicted"]),
        "prompts": runs["prompts"],
        "decoding": {"exact": runs["exact"], "tokens_per_pass": runs["tokens_per_pass"]},
        "versions": hardware.versions(),
        "hardware": hardware.description(),
        "job": job,
    }
    return _write_report(work, report)


_PLAIN = Plan("original", {}, {})


def measure(directory: Path, plan: Plan, text: str, options: Options, progress: Progress) -> dict[str, Any]:
    """Quality and memory of the model in `directory` as `plan` runs it; meant for a process of its own."""
    from tersor.integration import evaluation

    model, tokenizer = models.load(directory), models.load_tokenizer(directory)
    rows = evaluation.windows(tokenizer, text, options.eval_tokens, options.seq_len)
    plain = evaluation.read(model, rows, progress=progress)
    cached = evaluation.read(
        model, rows[: max(1, len(rows) // 4)], new_cache=lambda: plan.cache(model), progress=progress
    )
    return {
        "weight_bytes": models.tensor_nbytes(directory),
        "perplexity": plain.perplexity,
        "perplexity_through_cache": cached.perplexity,
        "kv_bytes_per_token": evaluation.kv_bytes_per_token(model, rows[0], plan.cache(model)),
        "peak_rss_bytes": evaluation.peak_rss_bytes(),
        "predicted": plain.predicted,
    }


def compete(runners: list[tuple[Path, Plan]], text: str, options: Options, progress: Progress) -> dict[str, Any]:
    """Speed of the models and what they write, in turn on the same prompts; meant for a process of its own."""
    from tersor.integration import evaluation

    tokenizer = models.load_tokenizer(runners[0][0])
    loaded = [(models.load(directory), plan) for directory, plan in runners]
    rows = evaluation.windows(tokenizer, text, 64 * _PROMPT_TOKENS, _PROMPT_TOKENS)
    prompts = list(rows[:: max(1, len(rows) // _PROMPTS)][:_PROMPTS, None])
    result = evaluation.race(loaded, prompts, options.new_tokens, progress=progress)
    model, plan = loaded[-1]
    # the decoder must not change what is written: the same model and cache, one token at a time
    greedy = Plan(plan.name, {}, {package: recipe for package, recipe in plan.recipes.items() if package != "decoding"})
    passes = evaluation.forward_passes(
        model, lambda: [plan.generate(model, p.to(model.device), options.new_tokens) for p in prompts]
    )
    alone = [greedy.generate(model, p.to(model.device), options.new_tokens)[0, p.shape[1] :].tolist() for p in prompts]
    return {
        "tokens_per_second": result.tokens_per_second,
        "prompt_latency_ms": result.prompt_latency_ms,
        "exact": alone == result.texts[-1],
        "tokens_per_pass": sum(map(len, alone)) / passes,
        "prompts": [
            {
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
                "texts": [tokenizer.decode(texts[i]) for texts in result.texts],
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def _shrink(source: Path, plan: Plan, folder: Path, options: Options, progress: Progress) -> None:
    from tersor.integration import evaluation

    model, tokenizer = models.load(source), models.load_tokenizer(source)
    calibration = Path(options.calibration).read_text() if options.calibration else zoo.calibration_text()
    rows = evaluation.windows(tokenizer, calibration, options.calibration_tokens, options.seq_len)
    model = plan.apply(model, rows.to(model.device), progress=progress)
    # parameters that were not quantised go back to the dtype they were read from: no bits are lost, half are saved
    dtype = models.checkpoint_dtype(source)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()


def _pack(plan: Plan, folder: Path, target: Path, progress: Progress) -> dict[str, int]:
    """Bytes on disk: of the archive, or of the folder if the plan makes no archive."""
    unpacked = _folder_nbytes(folder)
    if "lossless" not in plan.recipes:
        return {"disk_bytes": unpacked, "unpacked_bytes": unpacked}
    from tersor.lossless import pack

    pack(
        folder,
        target,
        plan.recipes["lossless"],
        overwrite=True,
        progress=lambda done, total: progress(done, total, "packing"),
    )
    return {"disk_bytes": target.stat().st_size, "unpacked_bytes": unpacked}


def _side(measured: dict[str, Any], runs: dict[str, Any], runner: int) -> dict[str, Any]:
    kept = {key: value for key, value in measured.items() if key != "predicted"}
    return kept | {key: runs[key][runner] for key in ("tokens_per_second", "prompt_latency_ms")}


def _share_equal(a: list[int], b: list[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def _texts(options: Options) -> str:
    return Path(options.text).read_text() if options.text else zoo.held_out_text()


def _write_report(work: Path, report: dict[str, Any]) -> dict[str, Any]:
    from tersor.integration.report import html

    (work / "report.json").write_text(json.dumps(report, indent=2))
    (work / "report.html").write_text(html(report))
    return report


def _publish(work: Path, out: Path) -> None:
    """Turn the work folder into `out`: from here on only renames, the last of which makes `out` appear."""
    result = work / "result"
    for name in (PACKED, "report.json", "report.html"):
        if (work / name).exists():
            (work / name).replace(result / name)
    if out.exists():
        out.replace(work / "replaced")
    result.replace(out)
    shutil.rmtree(work)


def _work_folder(out: Path, job: dict[str, Any]) -> Path:
    """The hidden folder beside `out` for this job; what another job left there is thrown away."""
    work = out.parent / f".{out.name}.partial"
    if work.exists() and _read_json(work / "job.json") != job:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    _write_json(work / "job.json", job)
    return work


def _remembered(path: Path, make: Callable[[], Any]) -> Any:
    """What `path` holds from an earlier run, else made now and written there."""
    if not path.exists():
        _write_json(path, make())
    return _read_json(path)


def _made(folder: Path, make: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    beside = folder.with_suffix(".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    make(beside)
    beside.replace(folder)


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_suffix(".unfinished")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _fingerprint(source: Path) -> list[list[Any]]:
    """Name, size and time of each file of the source: a changed model is another job."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(source.iterdir()) if p.is_file()]


def _folder_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _need_space(source: Path, out: Path) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; choose another --out")
    # the squeezed folder and its archive, even if nothing shrinks
    needed, free = 2 * _folder_nbytes(source), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"no space left: {out} may need {needed:,} bytes, {free:,} are free; choose another --out")
