"""The main job: a model and a plan in, a smaller model and an honest report out."""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.integration import hardware, models, texts
from tersor.integration.errors import UserError
from tersor.integration.plan import Plan
from tersor.integration.worker import run_apart
from tersor.integration.workplace import (
    done_before,
    fingerprint,
    folder_nbytes,
    made,
    need_space,
    publish,
    refuse_several_processes,
    remembered,
    work_folder,
)

Progress = Callable[[int, int, str], None]
PACKED = "model.tersor"
_PROMPT_TOKENS, _PROMPTS = 128, 3


@dataclass(frozen=True)
class Options:
    """How a squeeze calibrates and measures.

    Args:
        calibration: text file or data set for calibration; None is the text that ships with tersor.
        text: text file or data set for perplexity and agreement; None is the held-out text that ships with tersor.
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
        texts.check(self.calibration)
        texts.check(self.text)


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
    refuse_several_processes()
    source = models.locate(model)
    job = {
        "model": model,
        "plan": {"name": plan.name, **plan.settings},
        "options": asdict(options),
        "texts": [texts.identity(options.calibration), texts.identity(options.text)],
        "source": fingerprint(source),
    }
    if report := done_before(out, job, overwrite):
        return report
    # the squeezed folder and its archive, even if nothing shrinks
    need_space(2 * folder_nbytes(source), out)
    with work_folder(out, job) as work:
        report = _stages(source, plan, work, options, progress, job)
        publish(work, work / "result", out, PACKED, "report.json", "report.html")
    return report


def _stages(
    source: Path, plan: Plan, work: Path, options: Options, progress: Progress, job: dict[str, Any]
) -> dict[str, Any]:
    result, text = work / "result", texts.held_out(options.text)
    before = remembered(
        work / "before.json", lambda: run_apart(measure, source, _PLAIN, text, options, progress=progress)
    )
    made(result, lambda folder: _shrink(source, plan, folder, options, progress))
    after = remembered(work / "after.json", lambda: run_apart(measure, result, plan, text, options, progress=progress))
    sizes = remembered(work / "sizes.json", lambda: _pack(plan, result, work / PACKED, progress))
    runs = remembered(
        work / "race.json",
        lambda: run_apart(compete, [(source, _PLAIN), (result, plan)], text, options, progress=progress),
    )
    report = {
        "model": job["model"],
        "plan": job["plan"],
        "before": _side(before, runs, 0) | {"disk_bytes": folder_nbytes(source)},
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
    rows = evaluation.windows(
        tokenizer, texts.calibration(options.calibration), options.calibration_tokens, options.seq_len
    )
    model = plan.apply(model, rows.to(model.device), progress=progress)
    models.save(model, source, folder)
    del model
    gc.collect()


def _pack(plan: Plan, folder: Path, target: Path, progress: Progress) -> dict[str, int]:
    """Bytes on disk: of the archive, or of the folder if the plan makes no archive."""
    unpacked = folder_nbytes(folder)
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


def _write_report(work: Path, report: dict[str, Any]) -> dict[str, Any]:
    from tersor.integration.report import html

    (work / "report.json").write_text(json.dumps(report, indent=2))
    (work / "report.html").write_text(html(report))
    return report
