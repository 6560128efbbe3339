"""The house: who may import whom, and what every distribution has."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMBERS = [ROOT / "kernels", *sorted((ROOT / "packages").iterdir()), ROOT / "integration"]
FLOORS = {"kernels": 0, "integration": 2}  # packages are on floor 1: an import may only go down, or stay in its room
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where import and distribution differ


def modules(member: Path) -> list[Path]:
    return sorted((member / "src").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
def test_imports_go_from_integration_to_packages_to_kernels(member):
    for path in modules(member):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "tersor" and len(parts) > 1 and parts[1] != member.name:
                assert FLOORS.get(parts[1], 1) < FLOORS.get(member.name, 1), f"{path} imports {name}"


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
def test_what_is_imported_is_declared(member):
    """Every distribution that the source imports is declared, and every required one is imported."""
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    required = {_distribution(line) for line in project["dependencies"]}
    # an extra may also name a library whose models are known by their structure, without an import
    extras = {_distribution(line) for group in project.get("optional-dependencies", {}).values() for line in group}
    imported = set()
    for path in modules(member):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "tersor":
                imported |= {f"tersor-{parts[1]}"} if len(parts) > 1 and parts[1] != member.name else set()
            elif parts[0] not in sys.stdlib_module_names:
                imported.add(DISTRIBUTIONS.get(parts[0], parts[0]).replace("_", "-").lower())
    # triton comes with torch's GPU build
    assert imported - required - extras - {"triton"} == set()
    unused = required - imported
    if member.name == "integration":  # it finds packages by entry point
        unused -= {name for name in unused if name.startswith("tersor-")}
    assert unused == set()


def _distribution(requirement: str) -> str:
    for end in "[<>=!~; ":
        requirement = requirement.split(end)[0]
    return requirement.replace("_", "-").lower()


def test_no_package_hides_the_others():
    """`tersor` is a namespace: one tersor/__init__.py would make every other distribution invisible."""
    assert [path for member in MEMBERS for path in (member / "src/tersor").glob("__init__.py*")] == []


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
def test_every_distribution_is_complete(member):
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    assert project["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (member / "src/tersor" / member.name / "py.typed").is_file()
    assert len((member / "README.md").read_text().splitlines()) > 10
    assert list((member / "tests").glob("test_*.py"))
    for requirement in project["dependencies"]:
        if requirement.startswith("tersor"):
            assert requirement.endswith(f"=={project['version']}"), "siblings are pinned until 1.0"


def test_no_pickle_is_read_or_written():
    """Checkpoints are safetensors. The training scripts' own scratch files, which nobody is given, are not meant; nor are
    weights that a package of others brings as such: their checksum is known, and torch reads tensors alone."""
    for member in MEMBERS:
        for path in modules(member):
            if "training" not in path.parts:
                text = path.read_text()
                assert "import pickle" not in text, path
                assert "torch.save(" not in text, path
                if "third_party" in path.parts:
                    text = re.sub(r"torch\.load\(.*weights_only=True\)", "", text)
                assert "torch.load(" not in text, path
