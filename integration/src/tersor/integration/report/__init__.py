"""`report.html`: one self-contained page, readable without a network and without scripts."""

import io
from importlib.resources import files
from typing import Any


def html(report: dict[str, Any]) -> str:
    """The page of a squeeze's report."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("tersor.integration").joinpath("report", "page.html.jinja").read_text())
    charts = [_bars(report, key, title) for key, (title, _, _) in ROWS.items()]
    return template.render(report=report, rows=rows(report), charts=charts)


# key of before/after -> title, format, whether less is better
ROWS: dict[str, tuple[str, str, bool]] = {
    "disk_bytes": ("Bytes on disk", "{:,.0f}", True),
    "weight_bytes": ("Bytes of weights", "{:,.0f}", True),
    "kv_bytes_per_token": ("KV cache, bytes per token", "{:,.0f}", True),
    "peak_rss_bytes": ("Peak memory of the process, bytes", "{:,.0f}", True),
    "perplexity": ("Perplexity", "{:.3f}", True),
    "perplexity_through_cache": ("Perplexity, read through the KV cache", "{:.3f}", True),
    "tokens_per_second": ("Tokens per second", "{:.1f}", False),
    "prompt_latency_ms": ("First token of a prompt, ms", "{:.1f}", True),
}


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, bool]]:
    """Title, before, after, after/before, and whether that, as it is shown, is no worse: one row per figure."""
    table = []
    for key, (title, form, less_is_better) in ROWS.items():
        before, after = report["before"][key], report["after"][key]
        ratio = round(after / before, 2)
        no_worse = ratio <= 1 if less_is_better else ratio >= 1
        table.append((title, form.format(before), form.format(after), f"{ratio:.2f}×", no_worse))
    return table


def _bars(report: dict[str, Any], key: str, title: str) -> str:
    """An SVG with two bars, as text to be inlined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1, 1.25), layout="constrained")
    axes = figure.subplots()
    values = [report["after"][key], report["before"][key]]
    bars = axes.barh(["after", "before"], values, color=["#1f6f5c", "#b9c4c0"], height=0.7)
    axes.bar_label(bars, [ROWS[key][1].format(value) for value in values], padding=3, fontsize=7)
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_xlim(0, max(values) * 1.35)
    axes.tick_params(labelsize=7, length=0)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    buffer = io.StringIO()
    # Date: None, so that the same figures give the same page
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
