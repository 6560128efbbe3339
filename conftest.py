"""Fixtures of every package's tests: the zoo is read from the repository, so no package needs another one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ZOO = Path(__file__).parent / "integration/src/tersor/integration/zoo"


def _load_zoo() -> ModuleType:
    """`tersor.integration.zoo` under a name of its own, without `tersor.integration`."""
    spec: Any = importlib.util.spec_from_file_location("tersor_zoo", ZOO / "__init__.py")
    module = sys.modules["tersor_zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """The trained models: `zoo.load_model("tiny-vit")`, `zoo.path("tiny-lm")`."""
    return sys.modules.get("tersor_zoo") or _load_zoo()


@pytest.fixture(scope="session")
def tiny_lm_path(zoo) -> Path:
    """Directory of the trained embedded language model (config, safetensors, tokenizer)."""
    return zoo.path("tiny-lm")


@pytest.fixture
def tiny_lm(zoo):
    """The trained embedded language model in float32, fresh for each test: a test may change its modules."""
    return zoo.load_model("tiny-lm")


@pytest.fixture(scope="session")
def tiny_lm_tokenizer(tiny_lm_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_lm_path)


@pytest.fixture(scope="session")
def held_out_text(zoo) -> str:
    """English prose that the embedded model has not seen in training."""
    return zoo.held_out_text()


@pytest.fixture
def generator():
    """The one seed of the tests."""
    import torch

    return torch.Generator().manual_seed(0)
