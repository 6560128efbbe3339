"""The examples of the README run."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    assert "model.layers.1.mlp.down_proj 4416" in capsys.readouterr().out
