"""The `tersor` command. Results go to standard output, all else to standard error; nothing heavy is imported here."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from tersor.integration.console import Json, print_json, progress_bars, say
from tersor.integration.errors import UserError
from tersor.integration.zoo.commands import app as zoo_app

app = App(
    name="tersor",
    help="Make models cheaper to store, load and run.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)

app.command(zoo_app)


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
        Text file for calibration.
    text
        Text file on which both models are measured.
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
    from tersor.integration.squeeze import Options, finished
    from tersor.integration.squeeze import squeeze as run

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
    except (UserError, ImportError, ValueError, OSError) as error:
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
