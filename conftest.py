"""Fixtures of every package's tests: the embedded model is read from the repository, so no package needs another one."""

from pathlib import Path

import pytest

TINY_LM = Path(__file__).parent / "integration/src/tersor/integration/zoo/tiny_lm"


@pytest.fixture(scope="session")
def tiny_lm_path() -> Path:
    """Directory of the trained embedded language model (config, safetensors, tokenizer)."""
    return TINY_LM


@pytest.fixture
def tiny_lm(tiny_lm_path):
    """The trained embedded language model in float32, fresh for each test: a test may change its modules."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_lm_tokenizer(tiny_lm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_lm_path)


@pytest.fixture(scope="session")
def held_out_text(tiny_lm_path) -> str:
    """English prose that the embedded model has not seen in training."""
    return (tiny_lm_path.parent / "held_out.txt").read_text()


@pytest.fixture
def generator():
    """The one seed of the tests."""
    import torch

    return torch.Generator().manual_seed(0)
