"""`tersor quantize`: one recipe on one model, with a report of what every layer lost."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
    remembered,
    work_folder,
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """How quantising calibrates and how its result is compared with the original.

    Args:
        calibration: text file or data set; None is the text that ships with tersor.
        text: text file or data set for the comparison; None is the held-out text that ships with tersor.
        seq_len: tokens per window of both.
        keep: linears that stay as they are, as `tersor.quant.quantize` takes them.
        pad: add zeros to inputs that groups do not divide, as `tersor.quant.Recipe` takes it.
    """

    calibration: str | None = None
    text: str | None = None
    calibration_tokens: int = 16384
    eval_tokens: int = 8192
    seq_len: int = 512
    keep: tuple[str, ...] = ()
    pad: bool = False

    def __post_init__(self) -> None:
        for name, least in {"calibration_tokens": 1, "eval_tokens": 2, "seq_len": 2}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        texts.check(self.calibration)
        texts.check(self.text)


def quantize(
    model: str, settings: Mapping[str, Any], out: Path, options: Options, progress: Progress, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the quantised model and `report.json` to `out`; return the report.

    Args:
        model: a shipped name, a directory or a hub id.
        settings: {"recipe": name, knob: value, ...}, as in a plan.
        progress: called with (done, total, what).
        overwrite: replace `out` if it exists. Otherwise an `out` that this very job has made is returned as it is.

    Raises:
        UserError: whatever the user can mend; nothing was changed then.
    """
    _recipe(settings, options)
    source = models.locate(model)
    job = {"model": model, "recipe": dict(settings), "options": _plain(options), "source": fingerprint(source)}
    if report := done_before(out, job, overwrite):
        return report
    need_space(folder_nbytes(source), out)
    with work_folder(out, job) as work:
        result = work / "result"
        made(result, lambda folder: _shrink(source, settings, folder, options, progress))
        compared = remembered(
            work / "compared.json", lambda: run_apart(compare, source, result, options, progress=progress)
        )
        made_of = json.loads((result / "quantised.json").read_text())
        report = {
            **{key: job[key] for key in ("model", "recipe", "options")},
            **compared,
            **made_of,
            "versions": hardware.versions(),
            "hardware": hardware.description(),
            "job": job,
        }
        (result / "quantised.json").unlink()
        (work / "report.json").write_text(json.dumps(report, indent=2))
        publish(work, result, out, "report.json")
    return report


def dry_run(model: str, settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What `quantize` would leave behind and how long it would take, from the shapes of the model alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tersor.quant.estimate import estimate

    recipe, source = _recipe(settings, options), models.locate(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source), dtype=models.checkpoint_dtype(source)
        )
    empty.tie_weights()
    return asdict(estimate(empty, recipe, options.calibration_tokens, keep=options.keep))


def compare(source: Path, result: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """What the model in `result` lost against that in `source`; meant for a process of its own."""
    from tersor.integration import evaluation

    text = texts.held_out(options.text)
    rows = evaluation.windows(models.load_tokenizer(source), text, options.eval_tokens, options.seq_len)
    found = evaluation.compare(models.load(source), models.load(result), rows, progress=progress)
    return {
        "perplexity": {"before": found.perplexities[0], "after": found.perplexities[1]},
        "divergence": found.divergence,
        "flips": found.flips,
    }


def _recipe(settings: Mapping[str, Any], options: Options) -> Any:
    recipe = Plan.load({"quant": settings}).recipes["quant"]
    try:
        return replace(recipe, pad=options.pad)
    except ValueError as error:
        raise UserError(str(error)) from error


def _shrink(source: Path, settings: Mapping[str, Any], folder: Path, options: Options, progress: Progress) -> None:
    measured = run_apart(write, source, settings, folder, options, progress=progress)
    (folder / "quantised.json").write_text(json.dumps(measured))


def write(
    source: Path, settings: Mapping[str, Any], folder: Path, options: Options, progress: Progress
) -> dict[str, Any]:
    """Quantise the model in `source` to `folder`, in a process of its own: sizes, errors of layers, time and memory."""
    from tersor.integration import evaluation
    from tersor.quant import quantize

    recipe = _recipe(settings, options)
    model, tokenizer = models.load(source), models.load_tokenizer(source)
    rows = None
    if recipe.needs_data:
        text = texts.calibration(options.calibration)
        rows = evaluation.windows(tokenizer, text, options.calibration_tokens, options.seq_len).to(model.device)
    start = time.perf_counter()
    model = quantize(model, recipe, rows, keep=options.keep, progress=progress)
    seconds = time.perf_counter() - start
    models.save(model, tokenizer, folder, models.checkpoint_dtype(source))
    return {
        "bytes": _bytes(source, model),
        "layers": {name: _layer(layer) for name, layer in _quantised(model)},
        "seconds": seconds,
        "peak_rss_bytes": evaluation.peak_rss_bytes(),
    }


def _bytes(source: Path, model: Any) -> dict[str, Any]:
    """Bytes by component: each kind of buffer of the quantised layers, and all that stayed."""
    components = Counter()
    for _, layer in _quantised(model):
        components.update({name: buffer.nbytes for name, buffer in layer.named_buffers()})
    kept = sum(parameter.nbytes for parameter in model.parameters())
    return {"before": models.tensor_nbytes(source), "after": dict(components) | {"kept": kept}}


def _layer(layer: Any) -> dict[str, Any]:
    out_features, in_features = layer.weight_shape
    bits = 8 * layer.nbytes / (out_features * in_features)
    return {"relative_error": layer.relative_error, "nbytes": layer.nbytes, "bits_per_weight": bits}


def _quantised(model: Any) -> Sequence[tuple[str, Any]]:
    from tersor.quant.linear import QuantizedLinear

    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def _plain(options: Options) -> dict[str, Any]:
    """As JSON gives them back."""
    return asdict(options) | {"keep": list(options.keep)}
