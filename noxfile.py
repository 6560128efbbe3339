"""What is run where: `uv run nox -s tests` for everything, `nox -l` for the rest."""

import shutil
import subprocess
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # uv makes the environments: the workspace's, or a throw-away one per package
nox.options.sessions = ["tests", "lint", "types"]

ROOT = Path(__file__).parent
MEMBERS = ["kernels", *sorted(f"packages/{p.name}" for p in (ROOT / "packages").iterdir() if p.is_dir()), "integration"]
WORKSPACE = ["uv", "run", "--all-packages"]  # with what each member's own tests need
# tests start many processes: without compiled modules each would take ten seconds more to import transformers
ENV = {"PYTHONDONTWRITEBYTECODE": None}


def _distribution(member: str) -> str:
    return "tersor" if member == "integration" else f"tersor-{Path(member).name}"


@nox.session
def tests(session: nox.Session) -> None:
    """Every test of every package, in the workspace environment."""
    session.run(*WORKSPACE, "pytest", *session.posargs, env=ENV)


@nox.session
def alone(session: nox.Session) -> None:
    """Each package's own tests with only that package and what it declares: proves that users can install just one."""
    for member in session.posargs or MEMBERS:
        package = ["uv", "run", "--isolated", "--exact", "--package", _distribution(member)]
        session.run(*package, "pytest", member, env=ENV)


@nox.session
def lint(session: nox.Session) -> None:
    session.run("uv", "run", "ruff", "check", ".")
    session.run("uv", "run", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.run(*WORKSPACE, "basedpyright", "--level", "error")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks, ours and the peer's in one run; writes benchmarks.json. Name files to run fewer."""
    files = session.posargs or [
        str(path) for path in sorted(ROOT.glob("**/benchmarks/bench_*.py")) if ".venv" not in path.parts
    ]
    run = [*WORKSPACE, "--group", "peers", "pytest"]
    session.run(*run, "--benchmark-only", "--benchmark-json=benchmarks.json", "-m", "not gpu", *files)


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve, then strip uv.lock to names and versions. `-- --upgrade` takes newer ones."""
    session.run("uv", "lock", *session.posargs)
    path = ROOT / "uv.lock"
    stripped = subprocess.run(
        ["python3", ROOT / "tools/strip_lock.py"], input=path.read_text(), capture_output=True, text=True, check=True
    ).stdout
    beside = path.with_suffix(".lock.new")
    beside.write_text(stripped)
    shutil.move(beside, path)
