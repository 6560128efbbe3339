import json
import subprocess
import sys

import pytest

from tersor.integration import catalogue


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy():
    program = """
import sys
from tersor.integration.cli import app
app(["--help"], result_action="return_value")
assert not {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules), "heavy import"
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "squeeze" in done.stdout


def test_methods_as_json_are_the_catalogue(tersor):
    done = tersor("methods", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert all(entry.keys() == {"package", "name", "title", "source", "summary", "pieces"} for entry in listed)
    assert {(entry["package"], entry["name"]) for entry in listed} == {(m.package, m.name) for m in catalogue.methods()}


def test_methods_of_one_package(tersor):
    done = tersor("methods", "--package", "quant", "--json")
    assert {entry["name"] for entry in json.loads(done.stdout)} == set(catalogue.recipes("quant"))


def test_unknown_package_offers_the_near_one(tersor):
    done = tersor("methods", "--package", "qaunt")
    assert done.returncode == 2
    assert 'did you mean "quant"' in done.stderr


@pytest.mark.parametrize(
    "package", ["quant", *(pytest.param(p, marks=pytest.mark.slow) for p in catalogue.packages() if p != "quant")]
)
def test_the_catalogue_lives_without_a_package(package):
    """As after `pip uninstall tersor-quant`: its entry point and its module are gone, the rest goes on."""
    program = """
import sys, importlib.metadata as metadata
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["tersor", "{package}"]:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
import tersor.integration.catalogue as catalogue
found = catalogue.entry_points
catalogue.entry_points = lambda **selection: [e for e in found(**selection) if e.name != "{package}"]
names = catalogue.packages()
assert "{package}" not in names and len(names) == 6, names
assert catalogue.methods()
import tersor.integration
"""
    done = run(program.format(package=package))
    assert done.returncode == 0, done.stderr
