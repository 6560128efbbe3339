"""Random models, built on the spot: Llama has full-attention layers only, Gemma 3 mixes them with sliding windows."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, set_seed

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama():
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()


@pytest.fixture
def gemma3():
    """Five layers with a sliding window of 24 tokens, then one with full attention."""
    set_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=6, sliding_window=24, **SIZES)).eval()


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    return request.getfixturevalue(request.param)
