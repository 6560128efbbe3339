"""The front page tells the truth."""

import ast
import re
from pathlib import Path

from tersor.integration import catalogue, cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_status_table_is_the_catalogue():
    """To mend: put what `uv run tersor methods --markdown` prints between the two comments."""
    table = re.search(r"<!-- methods:[^\n]*-->\n(.*?)\n?<!-- /methods -->", README, re.DOTALL)
    assert table
    assert table[1].strip() == cli._markdown(catalogue.methods())


def test_examples_are_python_and_name_what_exists():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tersor."):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), block
