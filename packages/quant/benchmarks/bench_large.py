"""A random model of a Llama's shape with 7B weights: quantised from end to end, and a decode step beside that of bfloat16.

    pytest packages/quant/benchmarks/bench_large.py --benchmark-only -m gpu

A step is one token after PAST others, as transformers runs it: one kernel launched after the other. Weights are random:
nothing here tells what is lost. `-m slow` runs the same for a small shape on a CPU.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tersor.quant import quantize, recipes
from tersor.quant.linear import bits_per_weight

CONFIGS = {
    "7B": LlamaConfig(),  # transformers' own
    "small": LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096
    ),
}
CALIBRATION = {"7B": (128, 2048), "small": (32, 256)}
RECIPES = {"rtn": recipes.rtn(4, 128), "gptq": recipes.gptq(4, 128)}
PAST = 512

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.parametrize(
        "shape", [pytest.param("7B", marks=pytest.mark.gpu), pytest.param("small", marks=pytest.mark.slow)]
    ),
]


def device(shape: str) -> torch.device:
    return torch.device("cuda" if shape == "7B" else "cpu")


def synchronize(shape: str) -> None:
    if shape == "7B":
        torch.cuda.synchronize()


@cache
def dense(shape: str) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device(shape):
            return LlamaForCausalLM(CONFIGS[shape]).eval()
    finally:
        torch.set_default_dtype(before)


def ids(shape: str, rows: int, length: int) -> Tensor:
    return torch.randint(CONFIGS[shape].vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantise(shape, recipe, benchmark):
    """`peak_bytes`: of the GPU's memory, the model's own weights among them."""
    model, calibration = copy.deepcopy(dense(shape)), ids(shape, *CALIBRATION[shape])
    if shape == "7B":
        torch.cuda.reset_peak_memory_stats()

    def run() -> Any:
        quantised = quantize(model, RECIPES[recipe], calibration)
        synchronize(shape)
        return quantised

    quantised = benchmark.pedantic(run, rounds=1)
    if shape == "7B":
        benchmark.extra_info |= {
            "hardware": torch.cuda.get_device_name(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
    benchmark.extra_info["bits_per_weight"] = bits_per_weight(quantised)


@pytest.mark.parametrize("weights", ["bfloat16", "W4A16"])
@torch.inference_mode()
def test_decode_step(shape, weights, benchmark):
    model = dense(shape)
    if weights == "W4A16":
        model = quantize(copy.deepcopy(model), RECIPES["rtn"])
    context, past = ids(shape, 1, PAST + 1).to(model.device), DynamicCache()
    model(context[:, :-1], past_key_values=past, logits_to_keep=1)

    def step() -> None:
        model(context[:, -1:], past_key_values=past)
        past.crop(-1)
        synchronize(shape)

    benchmark.pedantic(step, rounds=100, warmup_rounds=10)
    if shape == "7B":
        benchmark.extra_info["hardware"] = torch.cuda.get_device_name()
