"""One decoding step after many tokens: `packed_attention`, codes decoded first, transformers' DynamicCache.

    pytest packages/kvcache/benchmarks/bench_attention.py --benchmark-only --benchmark-json=attention.json

A random Llama of the shape of SmolLM-135M (hidden 576, 9 query and 3 key heads of 64), or of wider attention (16 and 8),
4 layers, small vocabulary, prefilled with random keys and values. One thread; the contenders take turns, and the lower
quartiles of their CPU time are in `extra_info` (ms): `no history` is what the step costs without a cache.
"""

import statistics
import time
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tersor.kvcache import CompressedCache, packed_attention, recipes

SHAPES = {
    "SmolLM-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "wide": {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8},
}
ROUNDS = 15


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def filled(cache, dtype, num_heads, seq_len):
    for layer_idx in range(len(cache.layers)):
        keys, values = torch.randn(2, 1, num_heads, seq_len, 64, dtype=dtype)
        cache.update(keys, values, layer_idx)
    return cache


@torch.no_grad()
def step(model, cache, packed):
    with packed_attention(model) if packed else nullcontext():
        start = time.process_time()
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        return time.process_time() - start


@pytest.mark.parametrize("seq_len", [512, 2048, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_step(benchmark, shape, dtype, seq_len):
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=4, **SHAPES[shape])
    model = LlamaForCausalLM(config).eval().to(dtype)
    kinds = {
        "dynamic": (lambda: DynamicCache(config=config), False),
        "decoded 4 bits": (lambda: CompressedCache(config, recipes.kivi(4)), False),
        "packed 4 bits": (lambda: CompressedCache(config, recipes.kivi(4)), True),
        "packed 2 bits": (lambda: CompressedCache(config, recipes.kivi(2)), True),
    }
    contenders = {"no history": (None, False)} | {
        name: (filled(new(), dtype, config.num_key_value_heads, seq_len), packed)
        for name, (new, packed) in kinds.items()
    }
    times = {name: [] for name in contenders}

    def turn():
        for name, (cache, packed) in contenders.items():
            times[name].append(1000 * step(model, cache, packed))

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info |= {name: round(statistics.quantiles(t[2:])[0], 2) for name, t in times.items()}
