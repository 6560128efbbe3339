"""What commands say: results on standard output, all else on standard error. Nothing heavy is imported here."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import Parameter

Progress = Callable[[int, int, str], None]
Json = Annotated[bool, Parameter(negative=(), help="Print the result as JSON.")]


def say(line: str) -> None:
    print(f"tersor: {line}", file=sys.stderr)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar per kind of work on standard error; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[int, Any] = {}

        def show(done: int, total: int, what: str) -> None:
            # one bar at a time: a new one begins when the count starts again
            current = len(tasks) - 1
            if current < 0 or done <= bars.tasks[current].completed or total != bars.tasks[current].total:
                current += 1
                tasks[current] = bars.add_task(what, total=total)
            bars.update(tasks[current], completed=done, description=what[-32:])

        yield show


@contextmanager
def progress_lines(every: float = 30.0) -> Iterator[Progress]:
    """A line on standard error every so many seconds and at the end: for what takes long and is read in a log."""
    last = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every or done == total:
            last = time.monotonic()
            say(f"{done} of {total}: {what}")

    yield show


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
