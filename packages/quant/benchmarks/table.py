"""What the benchmarks of models measured, as tables in Markdown.

    python packages/quant/benchmarks/table.py recipes.json ...

Of each width the rows with the fewest bits first; bold: no row above it, with as few bits, has as small a divergence.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HEAD = (
    "| | recipe | bits per weight | body, KB | perplexity | KL | flips | CPU s |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """In the order in which they were measured."""
    for run in json.loads(path.read_text())["benchmarks"]:
        if "divergence" in run["extra_info"]:
            yield run["extra_info"] | {"seconds": run["stats"]["min"]}


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table for each model; models and widths stand in the order in which they first appear."""
    of_models: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        of_models.setdefault(row["model"], {}).setdefault(row["widths"], []).append(row)
    for model, of_widths in of_models.items():
        yield from (f"## {model}", "", *HEAD)
        for widths, some in of_widths.items():
            least = float("inf")
            for row in sorted(some, key=lambda row: (row["bits_per_weight"], row["divergence"])):
                bold = "**" if row["divergence"] < least else ""
                least = min(least, row["divergence"])
                yield (
                    f"| {widths} | {row['name']} | {row['bits_per_weight']:.3f} | {row['nbytes'] / 1000:,.0f} | "
                    f"{row['perplexity']:.2f} | {bold}{row['divergence']:.4f}{bold} | {row['flips']:.1%} | "
                    f"{row['seconds']:,.1f} |"
                )
        yield ""


if __name__ == "__main__":
    print("\n".join(tables(row for path in sys.argv[1:] for row in rows(Path(path)))))
