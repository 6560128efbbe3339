"""Pairs of modules whose channels can be scaled: all of them are found, and scaling them changes nothing."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tersor.quant.calibration import block_inputs
from tersor.quant.transform.fold import Pair, find_pairs, fold_scale, norms, offset

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS = {"head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention"], "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
# the other implementations of experts have no float64
EAGER = {"experts_implementation": "eager"}
ATTENTION = {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "v_proj": {"o_proj"}}
GATED = {"up_proj": {"down_proj"}}
LLAMA = {**ATTENTION, "post_attention_layernorm": {"gate_proj", "up_proj"}, **GATED}
GEMMA = {**ATTENTION, "pre_feedforward_layernorm": {"gate_proj", "up_proj"}, **GATED}
# per kind: the model, and by the last parts of their names what reads what
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True)), LLAMA),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=8)), LLAMA),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), LLAMA),
    # norms on q and k
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)), LLAMA),
    # norms of (1 + w), also after each branch
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, **LAYERS, query_pre_attn_scalar=8)), GEMMA),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, **LAYERS)), GEMMA),
    # one norm with a bias for both branches, and an MLP without a gate
    "phi": (
        lambda: PhiForCausalLM(PhiConfig(**SIZES)),
        {"input_layernorm": {"q_proj", "k_proj", "v_proj", "fc1"}, "v_proj": {"dense"}},
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=3, sliding_window=None, **EAGER)),
        {**ATTENTION, "post_attention_layernorm": {"gate.weight", "experts.gate_up_proj"}},
    ),
    "qwen2_moe": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=3, **EAGER)),
        {
            **ATTENTION,
            **GATED,
            "post_attention_layernorm": {
                "shared_expert_gate",
                "gate_proj",
                "up_proj",
                "gate.weight",
                "experts.gate_up_proj",
            },
        },
    ),
}
every_kind = pytest.mark.parametrize("kind", MODELS)


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind][0]().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter.data *= 5
        return model.to(dtype)


@pytest.fixture
def tokens(generator) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (3, 12), generator=generator)


def pairs_of(model, tokens) -> list[Pair]:
    (block,) = model.model.layers
    (inputs,) = block_inputs(model, [block], [{"input_ids": tokens}])
    return find_pairs(block, lambda: inputs.run(0, block))


def longest_end(name: str, ends: set[str]) -> str:
    return max((end for end in ends if name.endswith(end)), key=len)


@every_kind
def test_exactly_what_reads_a_norm_or_linear_is_found(kind, tokens):
    expected = MODELS[kind][1]
    pairs = pairs_of(make(kind), tokens)
    assert {pair.name.split(".")[-1] for pair in pairs} == set(expected)
    for pair in pairs:
        ends = expected[pair.name.split(".")[-1]]
        assert {longest_end(name, ends) for name in (*pair.readers, *pair.others)} == ends


@every_kind
@torch.no_grad()
def test_scaling_all_pairs_changes_nothing(kind, tokens, generator, in_double):
    model = in_double(make(kind))
    before, weights = model(tokens).logits, copy.deepcopy(model.state_dict())
    for pair in pairs_of(model, tokens):
        fold_scale(pair, torch.exp(2 * torch.randn(pair.channels, generator=generator)))
    after = model(tokens).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    changed = {
        name.split(".")[-2] for name, value in model.state_dict().items() if not torch.equal(value, weights[name])
    }
    assert len(changed) >= len(MODELS[kind][1]) + 2


@torch.no_grad()
def test_heads_that_share_a_value_share_its_scale(tokens):
    """Two key-value heads of 8 channels for four heads: o's inputs are v's channels 0-7, 0-7, 8-15, 8-15."""
    pair = next(pair for pair in pairs_of(make("llama"), tokens) if pair.name.endswith("v_proj"))
    assert pair.channel_of.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    values = torch.arange(32.0)
    assert pair.per_channel(values, "amax").tolist() == [*range(8, 16), *range(24, 32)]
    assert pair.per_channel(values, "mean").tolist() == [*range(4, 12), *range(20, 28)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_pairs_are_found_in_half_precision(dtype, tokens):
    """Powers of two are exact in all floating-point numbers but the smallest, which float16 often meets."""
    half, double = pairs_of(make("gemma3", dtype), tokens), pairs_of(make("gemma3"), tokens)
    assert [pair.name for pair in half] == [pair.name for pair in double]


def test_an_output_that_something_else_reads_is_no_pair():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.linear = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.norm(x)
            return self.linear(torch.relu(self.inner(h))) + h[..., :1]

    block, x = Block(), torch.randn(5, 8)
    # a ReLU keeps positive scales
    assert [pair.name for pair in find_pairs(block, lambda: block(x))] == ["inner"]
    block.forward = lambda x: block.linear(torch.relu(block.inner(block.norm(x))))
    assert [pair.name for pair in find_pairs(block, lambda: block(x))] == ["norm", "inner"]
    block.forward = lambda x: block.linear(torch.tanh(block.inner(block.norm(x))))
    assert [pair.name for pair in find_pairs(block, lambda: block(x))] == ["norm"]


def test_finding_leaves_the_model_as_it_was(tokens):
    model = make("qwen2_moe")
    before = copy.deepcopy(model.state_dict())
    pairs_of(model, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


@pytest.mark.parametrize(("kind", "expected"), [("llama", 0.0), ("phi", 0.0), ("gemma2", 1.0), ("gemma3", 1.0)])
def test_what_norms_add_to_their_weight_is_found(kind, expected):
    assert {offset(norm) for norm in norms(make(kind)).values()} == {expected}


@torch.no_grad()
def test_in_half_precision_a_scaled_norm_is_only_off_by_the_rounding_of_its_readers(tokens):
    """bfloat16 cannot say 1 + w = 1/100: it would be off by a quarter of it; so the readers take the scale that it can."""
    model = make("gemma3", torch.bfloat16)
    pair = pairs_of(model, tokens)[0]
    x = torch.randn(64, 32).bfloat16()
    reader = next(iter(pair.readers.values()))
    before = pair.source(x).double() @ reader.weight.double().T
    scale = torch.full((32,), 100.0)
    ideal = ((1 + pair.source.weight.double()) / 100 - 1).bfloat16().double() + 1
    assert ((ideal * 100 / (1 + pair.source.weight.double()) - 1).abs() > 0.05).any()
    fold_scale(pair, scale)
    after = pair.source(x).double() @ reader.weight.double().T
    # three roundings to 8 bits: the outputs of the norm before and after, the readers' weights
    assert (after - before).norm() < 2**-8 * before.norm()


@torch.no_grad()
def test_channels_that_would_leave_the_dtype_keep_their_scale(tokens):
    model = make("llama", torch.float16)
    pair = pairs_of(model, tokens)[0]
    scale = torch.ones(32)
    scale[:2] = torch.tensor([1e-6, 1e8])
    pair.source.weight[2], scale[2] = 0, 4.0
    before = pair.source.weight.clone(), {name: reader.weight.clone() for name, reader in pair.readers.items()}
    fold_scale(pair, scale)
    assert torch.equal(pair.source.weight, before[0])
    assert all(torch.equal(r.weight[:, :2], before[1][name][:, :2]) for name, r in pair.readers.items())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive(bad, tokens):
    pair = pairs_of(make("llama"), tokens)[0]
    with pytest.raises(ValueError, match=r"input_layernorm: scales must be 32 positive numbers"):
        fold_scale(pair, torch.full((32,), bad))


def test_an_overflow_is_an_error_and_changes_nothing(tokens):
    model = make("llama", torch.float16)
    pair = next(pair for pair in pairs_of(model, tokens) if pair.name.endswith("up_proj"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="up_proj: scales from 1e-09 .* overflow torch.float16"):
        fold_scale(pair, torch.full((48,), 1e-9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
