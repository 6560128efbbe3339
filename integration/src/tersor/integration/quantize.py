"""`tersor quantize`: one recipe on one model, with a report of what every layer lost."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
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
    refuse_several_processes,
    remembered,
    work_folder,
    write_json,
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
        stream: one block in memory at a time, by `tersor.quant.stream`; nothing is compared with the original then.
    """

    calibration: str | None = None
    text: str | None = None
    calibration_tokens: int = 16384
    eval_tokens: int = 8192
    seq_len: int = 512
    keep: tuple[str, ...] = ()
    pad: bool = False
    stream: bool = False

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
    refuse_several_processes()
    recipe = _recipe(settings, options)
    source = models.locate(model)
    job = {
        "model": model,
        "recipe": dict(settings),
        "options": _plain(options),
        "texts": [texts.identity(options.calibration), texts.identity(options.text)],
        "source": fingerprint(source),
    }
    if report := done_before(out, job, overwrite):
        return report
    _check_texts(source, recipe, options)
    need_space(folder_nbytes(source), out)
    with work_folder(out, job) as work:
        result = work / "result"
        stages = _streamed if options.stream else _in_memory
        report = {
            **{key: job[key] for key in ("model", "recipe", "options")},
            "tuned": bool(recipe.tuning),
            **stages(source, settings, work, options, progress),
            "versions": hardware.versions(),
            "hardware": hardware.description(),
            "job": job,
        }
        (work / "report.json").write_text(json.dumps(report, indent=2))
        publish(work, result, out, "report.json")
    return report


def dry_run(model: str, settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What `quantize` would leave behind and how long it would take, from the shapes of the model alone."""
    from tersor.quant.estimate import estimate

    recipe, source = _recipe(settings, options), models.locate(model, weights=False)
    return asdict(estimate(models.load_shapes(source), recipe, options.calibration_tokens, keep=options.keep))


def compare(source: Path, result: Path, options: Options, progress: Progress) -> dict[str, Any]:
    """What the model in `result` lost against that in `source`; meant for a process of its own."""
    from tersor.integration import evaluation

    rows = _held_out(source, options)
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


def _check_texts(source: Path, recipe: Any, options: Options) -> None:
    """Raises UserError, before any work, if a text that will be needed is too short."""
    try:
        if recipe.needs_data:
            _calibration(source, options)
        if not options.stream:
            _held_out(source, options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _calibration(source: Path, options: Options) -> Any:
    from tersor.integration.evaluation import windows

    text = texts.calibration(options.calibration)
    return windows(models.load_tokenizer(source), text, options.calibration_tokens, options.seq_len)


def _held_out(source: Path, options: Options) -> Any:
    from tersor.integration.evaluation import windows

    return windows(models.load_tokenizer(source), texts.held_out(options.text), options.eval_tokens, options.seq_len)


def _in_memory(
    source: Path, settings: Mapping[str, Any], work: Path, options: Options, progress: Progress
) -> dict[str, Any]:
    """Leaves `work / "result"`; what was measured."""
    result, measured = work / "result", work / "quantised.json"
    # measured before the result appears: one that is there is not made again
    made(
        result,
        lambda folder: write_json(measured, run_apart(write, source, settings, folder, options, progress=progress)),
    )
    compared = remembered(
        work / "compared.json", lambda: run_apart(compare, source, result, options, progress=progress)
    )
    return compared | json.loads(measured.read_text())


def _streamed(
    source: Path, settings: Mapping[str, Any], work: Path, options: Options, progress: Progress
) -> dict[str, Any]:
    """As `_in_memory`; the original, which may not fit into memory, is not compared with."""
    measured = remembered(
        work / "quantised.json",
        lambda: run_apart(stream, source, settings, work / "result", options, progress=progress),
    )
    return dict.fromkeys(("perplexity", "divergence", "flips")) | measured


def write(
    source: Path, settings: Mapping[str, Any], folder: Path, options: Options, progress: Progress
) -> dict[str, Any]:
    """Quantise the model in `source` to `folder`, in a process of its own: sizes, errors of layers, time and memory."""
    from tersor.quant import quantize
    from tersor.quant.linear import QuantizedLinear

    recipe = _recipe(settings, options)
    model = models.load(source)
    rows = _calibration(source, options).to(model.device) if recipe.needs_data else None
    start = time.perf_counter()
    model = quantize(model, recipe, rows, keep=options.keep, progress=progress)
    seconds = time.perf_counter() - start
    models.save(model, source, folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    buffers = {f"{name}.{key}": buffer for name, layer in layers.items() for key, buffer in layer.named_buffers()}
    stored = {name: tensor.nbytes for name, tensor in (*buffers.items(), *model.named_parameters())}
    return _measured(source, model, layers, stored, seconds)


def stream(
    source: Path, settings: Mapping[str, Any], target: Path, options: Options, progress: Progress
) -> dict[str, Any]:
    """As `write`, one block in memory at a time, and only those that an earlier run has not written."""
    from tersor.quant.stream import quantize_checkpoint

    recipe = _recipe(settings, options)
    start = time.perf_counter()
    # it is there if a run was stopped while it measured
    if not target.exists():
        rows = _calibration(source, options) if recipe.needs_data else None
        quantize_checkpoint(source, target, recipe, rows, keep=options.keep, progress=progress)
    seconds = time.perf_counter() - start
    model = models.load_shapes(source)
    names = json.loads((target / "config.json").read_text())["quantization_config"]["layers"]
    layers = {name: model.get_submodule(name) for name in names}
    return _measured(source, model, layers, models.stored_nbytes(target), seconds)


def _measured(
    source: Path, model: Any, layers: Mapping[str, Any], stored: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    """Bytes by component (each kind of buffer of the quantised layers, embeddings with the head, all else), and by layer.

    Args:
        layers: the quantised layers of `model`; of a streamed one, the linears that they replace.
        stored: bytes of each tensor that was written.
    """
    from tersor.integration import evaluation

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    components, nbytes = Counter(), Counter()
    for name, size in stored.items():
        owner, _, tensor = name.rpartition(".")
        if owner in layers and tensor != "bias":
            components[tensor] += size
            nbytes[owner] += size
        else:
            components["embeddings" if model.get_submodule(owner) in embeddings else "kept"] += size
    weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    return {
        "bytes": {"before": models.tensor_nbytes(source), "after": dict(components)},
        "bits_per_weight": 8 * nbytes.total() / sum(weights.values()),
        "layers": {
            name: {
                # known only where it was quantised in memory
                "relative_error": getattr(layer, "relative_error", None),
                "nbytes": nbytes[name],
                "bits_per_weight": 8 * nbytes[name] / weights[name],
            }
            for name, layer in layers.items()
        },
        "seconds": seconds,
        "peak_rss_bytes": evaluation.peak_rss_bytes(),
        "peak_gpu_bytes": evaluation.peak_gpu_bytes(),
    }


def _plain(options: Options) -> dict[str, Any]:
    """As JSON gives them back."""
    return asdict(options) | {"keep": list(options.keep)}
