"""The lock file: no address in it, and a plain uv completes it without changing a version."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def committed_lock() -> str:
    """The lock as git has it: uv completes the one in the working tree."""
    return subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def versions(lock: str) -> set[tuple[str, str]]:
    return {(package["name"], package.get("version", "")) for package in tomllib.loads(lock)["package"]}


def test_committed_lock_holds_no_address():
    lock = committed_lock()
    assert "://" not in lock
    assert "sha256" not in lock
    assert set(re.findall(r'registry = "([^"]*)"', lock)) == {"registry"}


def test_stripping_keeps_versions_and_graph():
    complete = (ROOT / "uv.lock").read_text()
    command = [sys.executable, ROOT / "tools/strip_lock.py"]
    stripped = subprocess.run(command, input=complete, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, input=stripped, capture_output=True, text=True, check=True).stdout
    assert again == stripped
    assert versions(stripped) == versions(complete)
    before, after = (
        {
            p["name"] + p.get("version", ""): sorted(d["name"] for d in p.get("dependencies", []))
            for p in tomllib.loads(lock)["package"]
        }
        for lock in (complete, stripped)
    )
    assert after == before


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_resolves_from_the_committed_lock_to_the_same_versions(tmp_path):
    for path in [ROOT / "pyproject.toml", *ROOT.glob("*/pyproject.toml"), *ROOT.glob("packages/*/pyproject.toml")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        if path.parent != ROOT:
            shutil.copy(path.parent / "README.md", copy.parent)
    lock = tmp_path / "uv.lock"
    lock.write_text(committed_lock())
    subprocess.run(["uv", "lock"], cwd=tmp_path, check=True, capture_output=True)
    assert versions(lock.read_text()) == versions(committed_lock())
