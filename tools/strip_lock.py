"""Rewrites uv.lock to names, versions, markers and the dependency graph: no address leaves this machine.

A filter from standard input to standard output, so that git can run it on `git add` (README, "Working on tersor").
uv completes such a file on the next `uv sync`: the versions count as preferences and are kept, only the addresses are
looked up anew. The members' `requires-dist` is left out so that uv sees the file as incomplete and completes it,
instead of trusting sources that are not there.
"""

import re
import sys

_SECTION = re.compile(r"\n\[package\.metadata[^\n]*\](?:\n(?!\[)[^\n]*)*")
_WHEELS = re.compile(r"\nwheels = \[(?:\n    [^\n]*)*\n\]")
_SDIST = re.compile(r"\nsdist = [^\n]*")
_REGISTRY = re.compile(r'registry = "[^"]*"')


def strip_lock(text: str) -> str:
    """The lock file `text` without addresses. Stripping twice changes nothing."""
    for pattern in (_SECTION, _WHEELS, _SDIST):
        text = pattern.sub("", text)
    return _REGISTRY.sub('registry = "registry"', text)


if __name__ == "__main__":
    sys.stdout.write(strip_lock(sys.stdin.read()))
