import sys
from types import SimpleNamespace

import pytest

from tersor.integration import cli


@pytest.fixture
def tersor(tmp_path, monkeypatch, capsys):
    """`tersor(*arguments)`, run in this process in an empty directory: exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
        try:
            code = cli.main() or 0
        except SystemExit as exit:
            code = exit.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The user's cache directory, moved to an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
