"""The `tersor` command. Results go to standard output, all else to standard error; nothing heavy is imported here."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from tersor.integration.bench import app as bench_app
from tersor.integration.console import Json, print_json, progress_bars, say
from tersor.integration.errors import MENDABLE
from tersor.integration.zoo.commands import app as zoo_app

app = App(
    name="tersor",
    help="Make models cheaper to store, load and run.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)

app.command(zoo_app)
app.command(bench_app)


@app.command
def squeeze(
    model: str = "tiny-lm",
    *,
    plan: str = "default",
    out: Path | None = None,
    calibration: str | None = None,
    text: str | None = None,
    calibration_tokens: int = 16384,
    eval_tokens: int = 8192,
    seq_len: int = 512,
    new_tokens: int = 48,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
) -> None:
    """Make a language model smaller and faster, and report what it cost.

    Parameters
    ----------
    model
        A model that ships with tersor, a local directory, or a hub id (owner/name).
    plan
        A plan's name or a TOML file: one recipe per package.
    out
        The directory to write; by default MODEL-PLAN here. It appears when all is done.
    calibration
        Text file, or data set (prose, source-code), for calibration.
    text
        Text file, or data set, on which both models are measured.
    calibration_tokens
        Tokens of it that are used.
    eval_tokens
        Tokens of it that are used.
    seq_len
        Tokens per window.
    new_tokens
        Tokens written per prompt when speed is measured.
    overwrite
        Replace OUT if it exists.
    """
    from tersor.integration.plan import Plan
    from tersor.integration.squeeze import Options
    from tersor.integration.squeeze import squeeze as run
    from tersor.integration.workplace import finished

    options = Options(calibration, text, calibration_tokens, eval_tokens, seq_len, new_tokens)
    chosen = Plan.load(plan)
    target = out or Path(f"{Path(model).name}-{chosen.name}")
    was_done = finished(target) is not None and not overwrite
    with progress_bars() as progress:
        report = run(model, chosen, target, options, progress, overwrite=overwrite)
    if was_done:
        say(f"{target} was done already")
    print_json(report) if json else _print_report(report, target)


@app.command
def quantize(
    model: str = "tiny-lm",
    *,
    recipe: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    set: Annotated[dict[str, str] | None, Parameter(negative=())] = None,
    keep: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    pad: Annotated[bool, Parameter(negative=())] = False,
    stream: Annotated[bool, Parameter(negative=())] = False,
    calibration: str | None = None,
    text: str | None = None,
    calibration_tokens: int = 16384,
    eval_tokens: int = 8192,
    seq_len: int = 512,
    out: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
) -> None:
    """Quantise a language model by one recipe, and report what it lost.

    Parameters
    ----------
    model
        A model that ships with tersor, a local directory, or a hub id (owner/name).
    recipe
        A recipe of the package quant: `tersor methods --package quant` lists them.
    bits
        Bits per weight, for recipes that let you choose.
    group_size
        Weights that share a scale; 0 for a whole row.
    set
        Another setting of the recipe, as in a plan: --set.order none --set.damp 0.1
    keep
        A linear that stays as it is, by the end of its name; may be given again.
    pad
        Add zeros to inputs that the groups do not divide.
    stream
        Hold two blocks in memory, not the model: for models that do not fit. Nothing is compared with the original then.
    calibration
        Text file, or data set (prose, source-code), for calibration.
    text
        Text file, or data set, on which both models are compared.
    calibration_tokens
        Tokens of it that are used.
    eval_tokens
        Tokens of it that are used.
    seq_len
        Tokens per window.
    out
        The directory to write; by default MODEL-RECIPE here. It appears when all is done.
    dry_run
        Say what would come out and how long it would take, and stop.
    overwrite
        Replace OUT if it exists.
    """
    from tersor.integration import quantize as command

    chosen: dict[str, Any] = {"recipe": recipe, **{key: _value(value) for key, value in (set or {}).items()}}
    chosen |= {} if bits is None else {"bits": bits}
    chosen |= {} if group_size is None else {"group_size": group_size or None}
    options = command.Options(calibration, text, calibration_tokens, eval_tokens, seq_len, keep, pad, stream)
    if dry_run:
        estimated = command.dry_run(model, chosen, options)
        print_json(estimated) if json else _print_estimate(estimated)
        return
    target = out or Path(f"{Path(model).name}-{recipe}")
    with progress_bars() as progress:
        report = command.quantize(model, chosen, target, options, progress, overwrite=overwrite)
    print_json(report) if json else _print_quantized(report, target)


@app.command
def export(directory: Path, *, format: str = "compressed-tensors", out: Path | None = None) -> None:
    """Write a quantised model as other engines load it.

    Parameters
    ----------
    directory
        What `quantize` or `squeeze` wrote.
    format
        compressed-tensors (vLLM, SGLang, transformers), gptq, awq or gguf (llama.cpp).
    out
        The directory, or for gguf the file, to write; by default DIRECTORY-FORMAT.
    """
    from tersor.integration import models
    from tersor.quant.export import export as run

    target = out or Path(f"{directory.name}.gguf" if format == "gguf" else f"{directory.name}-{format}")
    model = models.load(models.locate(str(directory)), dtype="auto")
    run(model, target, format, tokenizer=models.load_tokenizer(directory))
    if target.is_dir():
        models.copy_processor(directory, target)
    say(f"wrote {target}")


@app.command
def methods(
    *, package: str | None = None, json: Json = False, markdown: Annotated[bool, Parameter(negative=())] = False
) -> None:
    """List the published methods that the installed packages bring.

    Parameters
    ----------
    package
        Only this package's.
    markdown
        Print the table of the README.
    """
    from dataclasses import asdict

    from tersor.integration import catalogue

    found = catalogue.methods(package)
    if json:
        print_json([asdict(method) for method in found])
    elif markdown:
        print(_markdown(found))
    else:
        _print_methods(found)


@app.command
def pack(source: Path, target: Path, *, overwrite: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Compress a model directory or safetensors file, losslessly, into one file.

    Parameters
    ----------
    source
        A .safetensors file or a directory.
    target
        The archive to write.
    overwrite
        Replace TARGET if it exists.
    """
    from tersor.lossless import pack as run

    with progress_bars() as progress:
        run(source, target, overwrite=overwrite, progress=lambda done, total: progress(done, total, "packing"))
    say(f"{target}: {target.stat().st_size:,} bytes")


@app.command
def unpack(source: Path, target: Path, *, overwrite: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Restore what `pack` compressed, byte for byte.

    Parameters
    ----------
    source
        The archive.
    target
        The file or directory to write.
    overwrite
        Replace TARGET if it exists.
    """
    from tersor.lossless import unpack as run

    with progress_bars() as progress:
        run(source, target, overwrite=overwrite, progress=lambda done, total: progress(done, total, "unpacking"))
    say(f"restored {target}")


def main() -> None:
    """Entry point: what the user can mend is one line on standard error and exit code 2; `--debug` shows the traceback."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `tersor methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except cyclopts.CycloptsError as error:
        _fail(" ".join(str(error).split()), error, debug)
    except MENDABLE as error:
        _fail(str(error) or type(error).__name__, error, debug)


def _fail(message: str, error: Exception, debug: bool) -> None:
    if debug:
        raise error
    say(f"error: {message.splitlines()[0]}")
    raise SystemExit(2)


def _print_report(report: dict[str, Any], target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from tersor.integration.report import rows

    table = Table(
        "",
        "before",
        "after",
        "after / before",
        title=f"{report['model']}, plan {report['plan']['name']}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for title, before, after, ratio, better in rows(report):
        table.add_row(title, before, after, f"[{'green' if better else 'red'}]{ratio}")
    console = Console()
    console.print(table)
    console.print(f"Same next token as the original: {100 * report['agreement']:.1f} % of positions.", highlight=False)
    console.print(f"Model, archive and report: {target}", highlight=False, soft_wrap=True)


def _value(text: str) -> Any:
    """A setting as TOML would read it; words need no quotes."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _print_quantized(report: dict[str, Any], target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    # layers know what the solver left; a tuning changes them afterwards
    error = "relative error before tuning" if report["tuned"] else "relative error"
    table = Table("layer", "bits per weight", error, title=f"{report['model']}, {report['recipe']['recipe']}")
    for name, layer in report["layers"].items():
        known = layer["relative_error"] is not None
        table.add_row(name, f"{layer['bits_per_weight']:.3f}", f"{layer['relative_error']:.2e}" if known else "")
    console = Console()
    console.print(table)
    perplexity, nbytes = report["perplexity"], report["bytes"]
    parts = ", ".join(f"{name} {value:,}" for name, value in nbytes["after"].items())
    compared = "Streamed: not compared with the original, and errors of layers are not known."
    if perplexity:
        compared = (
            f"Perplexity {perplexity['before']:.2f} -> {perplexity['after']:.2f}, KL divergence {report['divergence']:.4f} "
            f"nats per token, another likeliest token at {100 * report['flips']:.1f} % of positions."
        )
    on_gpu = f", {report['peak_gpu_bytes'] / 2**20:,.0f} MiB on the GPU" if report["peak_gpu_bytes"] else ""
    for line in (
        compared,
        f"Bytes {nbytes['before']:,} -> {sum(nbytes['after'].values()):,}: {parts}.",
        f"{report['bits_per_weight']:.3f} bits per weight of the quantised layers.",
        f"{report['seconds']:.0f} s; peak memory {report['peak_rss_bytes'] / 2**20:,.0f} MiB{on_gpu}.",
        f"Model and report: {target}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _print_estimate(estimated: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {value:,}" for name, value in estimated["nbytes"].items())
    after = sum(estimated["nbytes"].values())
    print(f"Quantised layers: {estimated['original_nbytes']:,} -> {after:,} bytes ({parts}).")
    print(
        f"That is {estimated['bits_per_weight']:.3f} bits per weight; {estimated['other_nbytes']:,} bytes stay as they are."
    )
    if estimated["seconds"] is not None:
        print(f"About {estimated['seconds']:.0f} s on this machine.")


def _print_methods(found: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("package", "recipe", "method", "source", "what it does")
    for method in found:
        table.add_row(method.package, method.name, method.title, method.source, method.summary)
    Console().print(table)


def _markdown(found: list[Any]) -> str:
    lines = ["| package | recipe | method | what it does |", "| --- | --- | --- | --- |"]
    for method in found:
        url = (
            method.source
            if method.source.startswith("http")
            else f"https://arxiv.org/abs/{method.source.removeprefix('arXiv:')}"
        )
        lines.append(f"| {method.package} | `{method.name}` | [{method.title}]({url}) | {method.summary} |")
    return "\n".join(lines)
