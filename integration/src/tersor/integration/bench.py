"""`tersor bench`: how fast tersor is on this machine, beside what others do. Nothing heavy is imported here."""

import sys
from typing import Any, Literal

from cyclopts import App

from tersor.integration.console import Json, print_json, progress_bars, progress_lines, say
from tersor.integration.errors import UserError, near_match

app = App(name="bench", help="Measure tersor on this machine, beside its peers.")


@app.command
def kernels(
    *,
    only: str | None = None,
    seconds: float = 1.0,
    clock: Literal["wall", "cpu"] = "wall",
    threads: int | None = None,
    json: Json = False,
) -> None:
    """Time our ops and their peers in turn, with weights that no cache holds.

    A ratio is the other's time over ours: above 1 we are faster. "reading" is the time that it takes to read the bytes
    that ours must read, so its ratio is our share of the read bandwidth, which is measured first. Times are lower
    quartiles. A bar is the ratio that we want to reach.

    Parameters
    ----------
    only
        Cases whose name contains this, * and ? stand for anything; "*" are all of them. By default those that have a bar.
    seconds
        Per case; each contender has at least three turns, or one if its call takes longer than that.
    clock
        `wall`, or `cpu` for a machine that others use, too: the CPU time of one thread.
    threads
        By default as many as torch uses, or 1 for the CPU's time.
    """
    if seconds < 0:
        raise UserError(f"--seconds must not be negative, got {seconds}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    import torch

    from tersor.kernels import bench

    cases = bench.chosen(only)
    if not cases:
        raise UserError(f"no case matches {only!r}{near_match(only or '', {case.op for case in bench.cases()})}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or (1 if clock == "cpu" else before))
    try:
        report = _measured(cases, seconds, clock)
    finally:
        torch.set_num_threads(before)
    print_json(report) if json else _print_table(report)
    absent = {name: why for case in report["cases"] for name, why in case["absent"].items()}
    for name, why in absent.items():
        say(f"without {name}: {why}")


def _measured(cases: list[Any], seconds: float, clock: str) -> dict[str, Any]:
    import torch

    from tersor.integration.hardware import description, versions
    from tersor.kernels.bench import CLOCKS, race, read_bandwidth
    from tersor.kernels.bench.peers import GROUP

    results = []
    with progress_bars() if sys.stderr.isatty() else progress_lines() as progress:
        progress(0, 1, "read bandwidth")
        bandwidth = read_bandwidth(CLOCKS[clock])
        progress(1, 1, "read bandwidth")
        for done, case in enumerate(cases):
            progress(done, len(cases), case.name)
            results.append(race(case, bandwidth, seconds, CLOCKS[clock]))
        progress(len(cases), len(cases), "measured")
    return {
        "machine": description(),
        "versions": versions(*GROUP),
        "clock": clock,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": bandwidth / 1e9,
        "cases": [_described(result) for result in results],
    }


def _described(result: Any) -> dict[str, Any]:
    reading = result.rivals[0]
    return {
        "name": result.case.name,
        "op": result.case.op,
        "shape": result.case.shape,
        "us": 1e6 * result.seconds,
        "gb_per_s": result.rate / 1e9,
        "share_of_read_bandwidth": reading.ratio,
        "size": result.size,
        "rivals": [
            {
                "name": rival.name,
                "us": 1e6 * rival.seconds,
                "ratio": rival.ratio,
                "bar": rival.bar,
                "met": rival.met,
                "size": rival.size,
            }
            for rival in result.rivals
        ],
        "absent": result.absent,
    }


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "shape", "us", "GB/s", "beside", "us", "ratio", "bar", "met")
    for column in (2, 3, 5, 6, 7):
        table.columns[column].justify = "right"
    for case in report["cases"]:
        head = [_sized(case, "op"), case["shape"], f"{case['us']:.0f}", f"{case['gb_per_s']:.3g}"]
        for rival in case["rivals"]:
            bar = "" if rival["bar"] is None else f"{rival['bar']:g}"
            met = {None: "", True: "[green]yes", False: "[red]no"}[rival["met"]]
            table.add_row(*head, _sized(rival, "name"), f"{rival['us']:.0f}", f"{rival['ratio']:.2f}", bar, met)
            head = [""] * len(head)
        table.add_section()
    machine = report["machine"]
    console = Console()
    console.print(table)
    console.print(
        f"{machine['processor']}, {machine['cpu_capability']}; {report['clock']} time, threads: {report['threads']}; "
        f"reading: {report['read_gb_per_s']:.1f} GB/s; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        highlight=False,
    )


def _sized(entry: dict[str, Any], name: str) -> str:
    """With the size of what a coder writes, over the original's."""
    return entry[name] if entry["size"] is None else f"{entry[name]} ({entry['size']:.3f})"
