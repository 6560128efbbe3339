"""The coders on weights of trained models: pytest kernels/benchmarks/bench_coding.py --benchmark-only

`size` in the JSON is coded / original bytes.
"""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.kernels.bench.coding import coders

ZOO = Path(__file__).parents[2] / "integration/src/tersor/integration/zoo"


@cache
def tiny_lm() -> Tensor:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(ZOO / "tiny_lm/model.safetensors").values()
    return torch.cat([weight.bfloat16().flatten() for weight in weights])


@cache
def minilm() -> Tensor:
    third_party = pytest.importorskip("tersor.integration.zoo.third_party.minilm_l6")
    if not importlib.util.find_spec(third_party.PACKAGED.module):
        pytest.skip(f"needs {third_party.PACKAGED.requirement}")
    return torch.cat([p.detach().bfloat16().flatten() for p in third_party.minilm()[0].parameters()])


CASES = [*coders("tiny-lm", tiny_lm), *coders("MiniLM", minilm)]


def test_coders(timed, case, contender):
    timed(case, contender)
