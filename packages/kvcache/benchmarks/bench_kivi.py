"""One decoding step of one layer after 2048 tokens, and the bytes held per token (`nbytes_per_token` in the saved JSON).

    pytest packages/kvcache/benchmarks/bench_kivi.py --benchmark-only --benchmark-json=kivi.json

Peers: transformers' DynamicCache, and its QuantizedCache with the built-in fp8 backend (8 bits) and, where
optimum-quanto is installed, the quanto backend (4 bits).
"""

import importlib.util

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import QuantizedCache

from tersor.kvcache import CompressedCache, recipes

CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=64)
CACHES = {
    "dynamic": lambda: DynamicCache(config=CONFIG),
    "full": lambda: CompressedCache(CONFIG, recipes.full()),
    "kivi4": lambda: CompressedCache(CONFIG, recipes.kivi(4)),
    "kivi2": lambda: CompressedCache(CONFIG, recipes.kivi(2)),
    "transformers-fp8": lambda: QuantizedCache("fp8", CONFIG),
    "transformers-quanto4": lambda: QuantizedCache("quanto", CONFIG, nbits=4, q_group_size=32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_step(benchmark, name, dtype):
    if "quanto" in name and not importlib.util.find_spec("optimum"):
        pytest.skip("needs optimum-quanto")
    cache = CACHES[name]()
    keys, values = torch.randn(2, 1, 8, 2048, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.update(keys, values, 0)
    benchmark(cache.update, keys[:, :, :1], values[:, :, :1], 0)
    benchmark.extra_info["nbytes_per_token"] = _nbytes(cache.layers[0]) / cache.get_seq_length()


def _nbytes(thing) -> int:
    """Bytes of every tensor reachable from a cache layer."""
    if isinstance(thing, torch.Tensor):
        inner = [getattr(thing, name) for name in ("_data", "_scale", "_shift") if hasattr(thing, name)]
        return sum(map(_nbytes, inner)) if inner else thing.nbytes
    if isinstance(thing, (list, tuple)):
        return sum(map(_nbytes, thing))
    return sum(map(_nbytes, vars(thing).values())) if hasattr(thing, "__dict__") else 0
