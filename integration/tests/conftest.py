import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tersor.integration import cli, models, zoo


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


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A model whose squeeze takes little more than the imports."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    models.load_tokenizer(zoo.path("tiny-lm")).save_pretrained(folder)
    return folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The user's cache directory, moved to an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
