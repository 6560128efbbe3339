"""A function in a process of its own: its peak memory is its own, and it starts as a user's process would."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tersor.integration.errors import MENDABLE, UserError


def run_apart(function: Callable[..., Any], *args: Any, progress: Callable[[int, int, str], None]) -> Any:
    """`function(*args, progress=...)` in a fresh process; its progress is passed on, its errors are raised here.

    It ends when this one is gone, or interrupted, at any moment: what it writes must then be of no account, or what the next
    one goes on from.

    Raises:
        UserError: whatever the user can mend, with the message of what was raised there; caused by its traceback.
        RuntimeError: anything else, with the traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    with _interrupts_held_back():
        process.start()
    sender.close()
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"{function.__name__} died with exit code {process.exitcode}; out of memory?"
                ) from None
            if kind == "progress":
                progress(*value)
            elif kind == "error":
                message, details = value
                failure = RuntimeError(f"{function.__name__} failed:\n{details}")
                if message is None:
                    raise failure
                raise UserError(message) from failure
            else:
                return value
    finally:
        process.terminate()
        process.join()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the child has been handed all it needs; the child, born inside, never hears of it."""
    pending = []
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    usual = signal.signal(signal.SIGINT, lambda *_: pending.append(True)) if in_main_thread else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main_thread:
            signal.signal(signal.SIGINT, usual)
    if pending:
        signal.raise_signal(signal.SIGINT)


def _child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = function(*args, progress=lambda *state: sender.send(("progress", state)))
        sender.send(("result", result))
    except BrokenPipeError:
        pass  # nobody waits for us any more
    except Exception as error:
        message = (str(error) or type(error).__name__) if isinstance(error, MENDABLE) else None
        sender.send(("error", (message, traceback.format_exc())))


def _end_with_parent() -> None:
    """A parent that is killed ends nobody, and its next run would meet the child still at work on the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
