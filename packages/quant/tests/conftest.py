"""Tiny random models of the kinds whose blocks differ in what matters here."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tersor.quant.blocks import linears

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    # a bias on q, k and v
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    # norms after each branch, norms on q and k, two kinds of masks and positions, embedding tied to the head
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **LAYERS)),
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def make_model():
    """A fresh model of a kind, the same one at every call."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = KINDS[kind]().eval()
            for name, parameter in model.named_parameters():
                # fresh models have all biases at zero and all norms at one
                if "norm" in name or "bias" in name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
                # like `from_pretrained`, and unlike `model.to`, which also rounds the frequencies of the positions
                parameter.data = parameter.data.to(dtype)
            return model

    return make


@pytest.fixture
def all_on():
    """The same grid for every linear of a module."""
    return lambda module, grid: dict.fromkeys(linears(module).values(), grid)


@pytest.fixture
def ids(generator) -> torch.Tensor:
    """Calibration data: enough tokens for layers of 96 inputs."""
    return torch.randint(3, SIZES["vocab_size"], (16, 32), generator=generator)


@pytest.fixture
def in_double():
    """A model in float64, also in its norms, which otherwise go to float32 whatever they are given."""
    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        return tensor if args == (torch.float32,) and tensor.dtype == torch.float64 else to(tensor, *args, **kwargs)

    def patched(forward):
        def run(x):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "to", stay)
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
                return forward(x)

        return run

    def double(model: PreTrainedModel) -> PreTrainedModel:
        for name, module in model.double().named_modules():
            if "norm" in name:
                module.forward = patched(module.forward)
        return model

    return double
