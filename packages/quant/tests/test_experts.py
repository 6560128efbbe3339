"""Mixtures of experts, whose weights transformers holds in one parameter."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tersor.quant import quantize, recipes
from tersor.quant.allocation import DynamicProgram, RelativeError
from tersor.quant.estimate import estimate
from tersor.quant.experts import separate_experts
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
KINDS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32)),
    # (experts, in, out), interleaved gates that are clamped, biases
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES)),
}


def make(kind: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]().eval()
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        return model


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


@torch.no_grad()
def test_separate_experts_compute_the_same(model, ids):
    dense = model(ids).logits
    separate_experts(model)
    assert not [name for name, p in model.named_parameters() if p.ndim == 3]
    torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [recipes.rtn(8, 32), recipes.gptq(8, 32)], ids=["rtn", "gptq"])
@torch.no_grad()
def test_every_expert_is_quantised_saved_and_loaded(recipe, model, ids, tmp_path):
    dense = model(ids).logits
    quantize(model, recipe, ids)
    experts = [
        n for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and ".experts." in n and n[-1].isdigit()
    ]
    assert len(experts) == 2 * 2 * 4
    logits = model(ids).logits
    assert 0 < (logits - dense).norm() < 0.1 * dense.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


@torch.no_grad()
def test_what_was_loaded_is_saved_and_loaded_again(ids, tmp_path):
    """Other tensors lie on disk than the loaded model has: w1, w2 and w3 of each expert."""
    make("mixtral").save_pretrained(tmp_path / "dense")
    model = quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), recipes.rtn(4, 32))
    logits = model(ids).logits
    for first, second in itertools.pairwise(["dense", "once", "twice"]):
        if first == "dense":
            model.save_pretrained(tmp_path / second)
        else:
            AutoModelForCausalLM.from_pretrained(tmp_path / first).save_pretrained(tmp_path / second)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / second)(ids).logits, logits)


def test_experts_are_kept_whole(model):
    quantize(model, recipes.rtn(4, 32), keep=["experts"])
    assert any(parameter.ndim == 3 for parameter in model.parameters())
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_an_expert_that_no_token_reaches_is_named_before_work_starts(ids):
    model = make("mixtral")
    # the second expert of the second block loses to all others
    router = model.model.layers[1].mlp.gate
    router.weight.data[1] = 0
    router.register_forward_hook(lambda module, x, output: _without(1, output))
    separate_experts(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj\.1 saw no token .* keep="):
        quantize(model, recipes.gptq(4, 32), ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def _without(expert: int, output):
    logits, weights, chosen = output
    return logits, weights, torch.where(chosen == expert, (chosen + 2) % 4, chosen)


@torch.no_grad()
def test_what_is_refused_leaves_the_model_as_it_was(model, ids, tmp_path):
    before, logits = copy.deepcopy(model.state_dict()), model(ids).logits
    kinds = [type(module) for module in model.modules()]
    for recipe, data in ((recipes.rtn(4, 48), None), (recipes.gptq(4, 32), None), (recipes.gptq(4, 32), ids[:1, :1])):
        with pytest.raises(ValueError, match="is not a multiple|learns from data|saw no token"):
            quantize(model, recipe, data)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_layers_with_few_tokens_are_said_to_have_few(ids):
    with pytest.warns(UserWarning, match=r"gate_up_proj\.\d saw only \d+ tokens, fewer than its 64 inputs"):
        quantize(make("mixtral"), recipes.gptq(4, 32), ids[:4, :16])


def test_allocations_count_experts_one_by_one():
    model = make("mixtral")
    grids = [IntGrid(bits, 32) for bits in (2, 3, 4)]
    chosen = DynamicProgram(RelativeError()).allocate(model, grids, recipes.rtn(3, 32), None, 4.0)
    assert "model.layers.1.mlp.experts.down_proj.3" in chosen
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, nn.Parameter)


def test_sizes_are_estimated_expert_by_expert():
    model = make("mixtral")
    expected = estimate(model, recipes.rtn(4, 32))
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, nn.Parameter)
    quantize(model, recipes.rtn(4, 32))
    assert sum(expected.nbytes.values()) == sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
