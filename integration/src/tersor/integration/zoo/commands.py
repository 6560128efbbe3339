"""`tersor zoo`: what ships, how it was made, what it can do. Nothing heavy is imported here."""

import json as _json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from tersor.integration import zoo
from tersor.integration.console import Json, print_json, progress_bars, progress_lines, say

app = App(name="zoo", help="The small trained models that ship with tersor.")


@app.command(name="list")
def list_models(*, json: Json = False) -> None:
    """List the models: class, size, and how they were trained."""
    found = [_described(name) for name in zoo.names()]
    if json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "class", "size", "training")
    for model in found:
        table.add_row(model["name"], model["class"], f"{model['nbytes'] / 1e6:.1f} MB", _trained(model))
    Console().print(table)


@app.command
def show(name: str) -> None:
    """Show a model's card: data, training, figures, limits.

    Parameters
    ----------
    name
        A model of `tersor zoo list`.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    folder = zoo.path(name)
    Console().print(Markdown((folder / "README.md").read_text()))
    say(f"its files: {folder}")


@app.command
def train(name: str, *, out: Path | None = None, seed: int = 0) -> None:
    """Train a model anew, on the GPU if there is one. The same command goes on after a stop.

    Parameters
    ----------
    name
        A model of the zoo.
    out
        The directory of the run, by default NAME-run here; the model appears in its folder `model`.
    seed
        Of the weights and of all that is drawn; 0 is what ships.
    """
    from tersor.integration.zoo import families

    module, folder = families.training(name), out or Path(f"{name}-run")
    with progress_bars() if sys.stderr.isatty() else progress_lines() as progress:
        module.train(module.TRAININGS[name], folder, progress, seed)
    say(f"model and card: {folder / 'model'}")


@app.command
def evaluate(*names: str, json: Json = False, markdown: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Measure models against what they should reach and against no learning at all.

    Parameters
    ----------
    names
        Models of `tersor zoo list`; all of them if none is named.
    markdown
        Print the table of the zoo's README.
    """
    from tersor.integration.zoo import families

    chosen = names or tuple(zoo.names())
    rows: list[dict[str, Any]] = []
    with progress_bars() as progress:
        for done, name in enumerate(chosen):
            progress(done, len(chosen), f"measuring {name}")
            rows.append(_described(name) | {"figures": families.figures(name)})
        progress(len(chosen), len(chosen), "measured")
    if json:
        print_json([row | {"figures": [asdict(figure) for figure in row["figures"]]} for row in rows])
        return
    header = ["model", "size", "training", "measured", "reached", "wanted", "without learning"]
    cells = [_cells(row, figure) for row in rows for figure in row["figures"]]
    if markdown:
        lines = [header, ["---"] * len(header), *cells]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def _described(name: str) -> dict[str, Any]:
    folder = zoo.path(name)
    return {
        "name": name,
        "class": _json.loads((folder / "config.json").read_text())["architectures"][0],
        "nbytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "training": _json.loads((folder / "training.json").read_text()),
    }


def _cells(model: dict[str, Any], figure: Any) -> list[str]:
    return [
        model["name"],
        f"{model['nbytes'] / 1e6:.1f} MB",
        _trained(model),
        figure.metric,
        figure.shown(figure.value),
        "" if figure.bar is None else figure.shown(figure.bar),
        f"{figure.shown(figure.baseline)} ({figure.baseline_name})",
    ]


def _trained(model: dict[str, Any]) -> str:
    training = model["training"]
    return f"{training['minutes']:.0f} min, {training['hardware']}"
