"""GGUF files: their library decodes our weights, transformers loads the model and the tokenizer."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.export import Unexportable, export
from tersor.quant.export.gguf import blocks_of
from tersor.quant.grid import IntGrid
from tersor.quant.grid.microscaling import MXFP4Grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme

gguf = pytest.importorskip("gguf")

quick = settings(deadline=None, max_examples=30, derandomize=True)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 8}


def layer_of(grid, out, width, seed) -> QuantizedLinear:
    linear = nn.Linear(width, out, bias=False)
    linear.weight.data = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) + 0.3
    params = grid.fit(linear.weight.data)
    stored = grid.pack(grid.encode(linear.weight.data, params), params)
    return QuantizedLinear.from_linear(linear, Scheme(grid), stored)


def decoded(kind, data) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@quick
@given(
    st.one_of(
        st.builds(IntGrid, st.integers(1, 8), st.sampled_from([32, 64, None]), st.just(True)),
        st.builds(IntGrid, st.integers(5, 7), st.sampled_from([32, 64, None]), st.just(False)),
        st.builds(MXFP4Grid, group_size=st.sampled_from([32, 64])),
    ),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_the_library_decodes_symmetric_and_wide_grids_to_the_same_weights(grid, out, seed):
    layer = layer_of(grid, out, 64, seed)
    kind, data = blocks_of(layer)
    assert kind == ("MXFP4" if isinstance(grid, MXFP4Grid) else "Q4_0" if grid.bits <= 4 else "Q8_0")
    assert torch.equal(decoded(kind, data), layer.dequantize())


@quick
@given(st.integers(1, 4), st.sampled_from([32, 64, None]), st.booleans(), st.integers(1, 9), st.integers(0, 99))
def test_minima_of_zero_points_are_rounded_to_float16_and_nothing_else(bits, group_size, float_zero, out, seed):
    layer = layer_of(IntGrid(bits, group_size, float_zero=float_zero), out, 64, seed)
    kind, data = blocks_of(layer)
    assert kind == "Q4_1"
    _, params = layer.scheme.grid.unpack(layer.stored(), layer.weight_shape)
    repeats = 64 // params.scale.shape[1]
    minimum = (params.scale.float() * params.zero_point.float()).repeat_interleave(repeats, 1)
    # float16 has 11 bits; the sums are rounded to float32
    assert ((decoded(kind, data) - layer.dequantize()).abs() <= minimum.abs() * 2**-11 * 1.001 + 1e-6).all()


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA3))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2))


def qwen2_without_head_dim():
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2, tie_word_embeddings=True))


def llama3():
    rope = LLAMA3 | {"original_max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, attention_bias=True, rope_parameters=rope))


def shaken(model):
    """The model with norms other than one and biases other than zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def distance(one, other, ids) -> float:
    return float((one(ids).logits - other(ids).logits).abs().max())


def plain_config(model):
    """Its config without our part: files do not tell all of it."""
    settings = model.config.to_dict()
    del settings["quantization_config"]
    return type(model.config)(**settings)


@pytest.mark.parametrize(
    "kind", ["llama", gemma3, qwen3, qwen2_without_head_dim], ids=lambda k: k if isinstance(k, str) else k.__name__
)
def test_transformers_computes_the_same_logits(kind, make_model, ids, tmp_path):
    model = make_model(kind) if isinstance(kind, str) else shaken(kind())
    # a q_proj in another format goes through the same order of rows
    model = quantize(model, recipes.rtn(4, 32, symmetric=True), keep=["layers.1.self_attn.q_proj"])
    export(model, tmp_path / "model.gguf", "gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=plain_config(model))
    assert distance(model, loaded, ids) < 1e-5


def test_mistral_is_a_llama_that_sees_as_far_as_its_window(make_model, ids, tmp_path):
    model = quantize(make_model("mistral"), Recipe(MXFP4Grid()))
    export(model, tmp_path / "model.gguf", "gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.max_position_embeddings == 8
    assert distance(model, loaded, ids[:, :8]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_quantised_keeps_its_dtype(dtype, make_model, tmp_path):
    model = quantize(make_model("qwen2", dtype), recipes.rtn(4, 32))
    export(model, tmp_path / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    values = torch.from_numpy(gguf.dequantize(embedding.data, embedding.tensor_type).copy())
    assert torch.equal(values.to(dtype), model.get_input_embeddings().weight)
    for name in ("output_norm.weight", "blk.1.attn_k.bias"):
        assert tensors[name].tensor_type.name == "F32"


def test_scaled_positions_are_stored_as_factors(ids, tmp_path):
    model = quantize(shaken(llama3()), recipes.rtn(8, 32, symmetric=True))
    export(model, tmp_path / "model.gguf", "gguf")
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    # high frequencies stay, low ones are divided by the factor
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(LLAMA3["factor"])


def test_the_file_says_what_engines_ask(tmp_path):
    model = quantize(shaken(gemma3()), recipes.rtn(4, 32), keep=["mlp"])
    export(model, tmp_path / "model.gguf", "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    expected = {
        "general.architecture": "gemma3",
        "general.file_type": 3,
        "gemma3.attention.sliding_window": 8,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.attention.key_length": 16,
        "gemma3.block_count": 7,
        "tokenizer.ggml.model": "none",
    }
    assert {name: fields[name] for name in expected} == expected


def test_byte_level_tokenizers_go_with_the_model(tiny_lm, tiny_lm_tokenizer, held_out_text, tmp_path):
    export(quantize(tiny_lm, recipes.rtn(4, 64)), tmp_path / "model.gguf", "gguf", tokenizer=tiny_lm_tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # transformers does not know the way in which this one cuts numbers, llama.cpp does
    text = "".join(c for c in held_out_text[:3000] if not c.isdigit())
    assert again(text).input_ids == tiny_lm_tokenizer(text).input_ids
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    "recipe",
    [recipes.rtn(3, 64), recipes.rtn(8, 32, symmetric=True), Recipe(MXFP4Grid())],
    ids=["3 bits", "8 bits", "MXFP4"],
)
def test_llama_cpp_reads_the_text_and_predicts_the_same(recipe, tiny_lm, tiny_lm_tokenizer, held_out_text, tmp_path):
    """With `pip install llama-cpp-python`, which compiles for minutes. It rounds what goes into a linear to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    text = held_out_text[:800]
    ids = tiny_lm_tokenizer(text, return_tensors="pt").input_ids
    model = quantize(tiny_lm, recipe)
    export(model, tmp_path / "model.gguf", "gguf", tokenizer=tiny_lm_tokenizer)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    assert llama.tokenize(text.encode(), add_bos=False) == ids[0].tolist()
    llama.eval(ids[0].tolist())
    theirs = torch.tensor(llama.scores[: ids.shape[1]]).log_softmax(-1)
    llama.close()
    with torch.no_grad():
        ours = model(ids).logits[0].log_softmax(-1)
    # nats per token; rounding weights to 3 bits makes .08, to MXFP4 .04
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 2e-3


def test_tokenizers_that_fall_back_on_bytes_go_with_the_model(make_model, held_out_text, tmp_path):
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    blank = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).backend_tokenizer
    blank.train_from_iterator(held_out_text[:9000].split(), BpeTrainer(vocab_size=600, special_tokens=pieces))
    trained = json.loads(blank.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=trained["vocab"], merges=list(map(tuple, trained["merges"])), add_bos_token=True)
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    export(quantize(model, recipes.rtn(4, 32)), tmp_path / "model.gguf", "gguf", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = held_out_text[:2000] + " \u20ac\U0001f600"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again(text).input_ids[0] == 1


def test_there_are_as_many_tokens_as_rows_of_the_embedding(tiny_lm, tiny_lm_path, make_model, tmp_path):
    """As llama.cpp wants it: Gemma 3 has a token for pictures that models of text alone have no row for."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == tiny_lm.config.vocab_size + 1
    export(quantize(tiny_lm, recipes.rtn(4, 64)), tmp_path / "model.gguf", "gguf", tokenizer=tokenizer)
    tokens = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == tiny_lm.config.vocab_size
    assert "<image>" not in tokens
    with pytest.raises(Unexportable, match=r"tokenizer has \d+ tokens, the model 97: give the tokenizer of the model"):
        export(quantize(make_model(), recipes.rtn(4, 32)), tmp_path / "other.gguf", "gguf", tokenizer=tokenizer)


def test_tokenizers_that_llama_cpp_does_not_know_are_refused(make_model, tiny_lm_path, tmp_path):
    from tokenizers import models
    from tokenizers.pre_tokenizers import ByteLevel

    model, tokenizer = quantize(make_model(), recipes.rtn(4, 32)), AutoTokenizer.from_pretrained(tiny_lm_path)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(use_regex=False)
    with pytest.raises(Unexportable, match="no name that we know for the way .* export without tokenizer"):
        export(model, tmp_path / "model.gguf", "gguf", tokenizer=tokenizer)
    tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0}, unk_token="a")
    with pytest.raises(Unexportable, match="tokenizers of type BPE, not WordLevel; export without tokenizer"):
        export(model, tmp_path / "model.gguf", "gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (IntGrid(8, 32), "wants MXFP4Grid, or integers that are symmetric or of few bits"),
        (IntGrid(6, 32, float_zero=True), "wants MXFP4Grid, or integers"),
        (IntGrid(4, 16), "wants groups of a multiple of 32, got 16"),
    ],
)
def test_grids_without_a_kind_are_refused(grid, reason, make_model, tmp_path):
    model = quantize(make_model(), Recipe(grid))
    with pytest.raises(Unexportable, match=rf"model\.layers\.0\.self_attn\.q_proj: GGUF {reason}"):
        export(model, tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_models_that_llama_cpp_computes_otherwise_are_refused(make_model, tmp_path):
    def expect(match, model):
        model = quantize(model, recipes.rtn(4, 32))
        with pytest.raises(Unexportable, match=match):
            export(model, tmp_path / "model.gguf", "gguf")
        assert not list(tmp_path.iterdir())

    expect("every sixth layer of gemma3", make_model("gemma3"))
    expect(
        "the root of head_dim = 16, the model by that of query_pre_attn_scalar = 256",
        gemma_of(query_pre_attn_scalar=256),
    )
    config = LlamaConfig(**SIZES, num_hidden_layers=1, hidden_act="gelu")
    expect("computes llama with silu, the model with gelu", LlamaForCausalLM(config))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**SIZES, num_hidden_layers=1, rope_parameters=rope)
    expect("positions of type .*, not 'dynamic'", LlamaForCausalLM(config))


def test_a_missing_library_is_named(make_model, tmp_path, monkeypatch):
    model = quantize(make_model(), recipes.rtn(4, 32))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'tersor-quant\[gguf\]'"):
        export(model, tmp_path / "model.gguf", "gguf")


def gemma_of(**changes):
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **(GEMMA3 | changes)))
