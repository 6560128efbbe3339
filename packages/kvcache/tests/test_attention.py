"""Attention over codes equals attention over decoded tokens, and decodes next to none."""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, set_seed

from tersor.kernels import attend_quantized
from tersor.kvcache import CompressedCache, attention, packed_attention, recipes
from tersor.kvcache.codec import FullPrecision, PerChannel, PerToken
from tersor.kvcache.history import History, LazyTensor
from tersor.kvcache.recipe import Recipe
from tersor.kvcache.stream import Stream
from tersor.kvcache.window import FlushedWindow, RecentWindow

SMALL = recipes.kivi(4, group_size=8, residual_length=16)
RECIPES = {f"kivi{bits}": recipes.kivi(bits, group_size=8, residual_length=16) for bits in range(1, 9)} | {
    "full": recipes.full(),
    "keys only": replace(SMALL, value_codec=FullPrecision()),
    "values only": replace(SMALL, key_codec=FullPrecision()),
    "keys per token, values per channel": replace(SMALL, key_codec=PerToken(3, 16), value_codec=PerChannel(5, 4)),
    "nothing in full precision": Recipe(PerChannel(2, 8), PerToken(2, 8), undo=0),
}
TOLERANCE = 2e-6  # float32 sums in another order


@pytest.fixture
def short_histories(monkeypatch):
    """Codes are read however few they are."""
    monkeypatch.setattr(attention, "MIN_VALUES", 1)


@pytest.fixture
def read(monkeypatch):
    """Tokens that were read as codes, call by call."""
    tokens = []

    def spy(query, key, *args):
        tokens.append(key[0].shape[2])
        return attend_quantized(query, key, *args)

    monkeypatch.setattr(attention, "attend_quantized", spy)
    return tokens


@pytest.fixture
def decoded(monkeypatch):
    """Tokens that were decoded, call by call."""
    tokens = []
    for piece in (PerChannel, PerToken):

        def spy(codec, codes, dtype, decode=piece.decode):
            tokens.append(codes[0].shape[2])
            return decode(codec, codes, dtype)

        monkeypatch.setattr(piece, "decode", spy)
    return tokens


@pytest.fixture
def qwen2():
    """Query, key and value projections with biases; seven query heads to a key head."""
    set_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 112, "intermediate_size": 64, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(num_attention_heads=7, num_key_value_heads=1, **sizes)).eval()


@pytest.fixture(params=["llama", "gemma3", "qwen2"])
def model(request):
    return request.getfixturevalue(request.param)


def prompt(batch=1, seq_len=70, seed=0):
    return torch.randint(2, 128, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, ids, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


@torch.no_grad()
def random_states(cache, seq_len, batch):
    for layer_idx in range(len(cache)):
        keys, values = torch.randn(2, batch, 2, seq_len, 32, generator=torch.Generator().manual_seed(0))
        cache.update(keys, values, layer_idx)


def assert_close(x, reference):
    assert (x - reference).norm() <= TOLERANCE * reference.norm()


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("llama", recipe) for recipe in RECIPES] + [("gemma3", "kivi4"), ("qwen2", "kivi4")],
    indirect=["model"],
)
def test_logits_are_those_of_the_decoding_way(model, recipe, short_histories):
    cache = CompressedCache(model.config, RECIPES[recipe])
    for part in prompt(batch=2, seq_len=99).split([70, 1, 1, 5, 1, 20, 1], 1):
        reference = forward(model, copy.deepcopy(cache), part)
        with packed_attention(model):
            assert_close(forward(model, cache, part), reference)


@pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 5}, {"do_sample": True, "temperature": 2.0}],
    ids=["greedy", "beams", "prompt lookup", "sampling"],
)
def test_generate_gives_the_same_tokens(model, kwargs, short_histories, read):
    ids = prompt(seq_len=20).repeat(1, 4)
    mask = torch.ones_like(ids)
    if "prompt_lookup_num_tokens" not in kwargs:
        ids = torch.cat([ids, prompt(seq_len=80, seed=1)])
        mask = torch.ones_like(ids)
        ids[0, :37] = mask[0, :37] = 0
    outputs = []
    for attending in (False, True):
        set_seed(0)
        cache = CompressedCache(model.config, RECIPES["kivi2"])
        run = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 20, "do_sample": False} | kwargs
        if attending:
            with packed_attention(model):
                outputs.append(model.generate(ids, **run))
            assert read
        else:
            outputs.append(model.generate(ids, **run))
            assert not read
    assert torch.equal(*outputs)


def test_bfloat16_and_float64_keep_their_dtype(llama, short_histories, read):
    # bfloat16: the decoding way rounds keys and values to it; float64: sums in float64
    for dtype, tolerance in ((torch.bfloat16, 2**-6), (torch.float64, 1e-12)):
        model = llama.to(dtype)
        cache = CompressedCache(model.config, SMALL)
        forward(model, cache, prompt())
        reference = forward(model, copy.deepcopy(cache), prompt(seq_len=1))
        with packed_attention(model):
            logits = forward(model, cache, prompt(seq_len=1))
        assert logits.dtype == dtype
        assert (logits - reference).norm() < tolerance * reference.norm()
    assert len(read) == 4


@pytest.mark.parametrize("recipe", [SMALL, RECIPES["keys per token, values per channel"]], ids=str)
def test_a_step_decodes_a_window_and_no_more(llama, recipe, short_histories, read, decoded):
    cache = CompressedCache(llama.config, recipe)
    with packed_attention(llama):
        forward(llama, cache, prompt(seq_len=500))
        decoded.clear()
        for _ in range(40):
            written = cache.get_seq_length() // 16 * 16
            forward(llama, cache, prompt(seq_len=1))
            # keys that left their window while their values are in it, and what precedes them in their group
            assert sum(decoded) <= 2 * (16 + 8)
            assert read == 2 * [written]
            decoded.clear()
            read.clear()
    forward(llama, cache, prompt(seq_len=1))
    assert sum(decoded) > 4 * 500


def test_sliding_layers_read_no_codes(gemma3, short_histories, read):
    cache = CompressedCache(gemma3.config, SMALL)
    with packed_attention(gemma3):
        forward(gemma3, cache, prompt())
        forward(gemma3, cache, prompt(seq_len=1))
    assert len(read) == 1


def test_short_histories_and_many_queries_are_decoded(llama, read):
    with packed_attention(llama):
        # 2^18 = 8 sequences x 2 heads x 32 channels x 512 tokens
        for seq_len, num_queries, as_codes in ((639, 1, False), (640, 1, True), (640, 64, True), (640, 65, False)):
            cache = CompressedCache(llama.config, recipes.kivi(4))
            random_states(cache, seq_len, batch=8)
            read.clear()
            forward(llama, cache, prompt(batch=8, seq_len=num_queries))
            assert bool(read) == as_codes


def test_other_caches_and_none_are_attended_as_by_sdpa(model):
    ids = prompt(seq_len=30)
    reference = forward(model, DynamicCache(config=model.config), ids), forward(model, None, ids)
    with packed_attention(model):
        found = forward(model, DynamicCache(config=model.config), ids), forward(model, None, ids)
    assert all(map(torch.equal, found, reference))


def test_a_copy_of_a_cache_attends_as_the_model_does_later(llama, short_histories, read):
    cache = CompressedCache(llama.config, SMALL)
    forward(llama, cache, prompt())
    other = copy.deepcopy(cache)
    assert all(layer.config is llama.config for layer in other.layers)
    with packed_attention(llama):
        forward(llama, other, prompt(seq_len=1))
    assert read
    assert (cache.get_seq_length(), other.get_seq_length()) == (70, 71)


def test_gradients_go_through_decoded_tokens(llama, short_histories, read):
    gradients = []
    for attending in (False, True):
        cache = CompressedCache(llama.config, SMALL)
        forward(llama, cache, prompt())
        llama.zero_grad()
        if attending:
            with packed_attention(llama):
                llama(prompt(seq_len=1), past_key_values=cache).logits.sum().backward()
        else:
            llama(prompt(seq_len=1), past_key_values=cache).logits.sum().backward()
        gradients.append(llama.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)
    assert not read


# --- the switch ----------------------------------------------------------------------------------------------------


def test_the_model_is_given_back_as_it_was_also_after_an_error(model):
    for before in ("sdpa", "eager"):
        model.set_attn_implementation(before)
        forwards, config = [m.forward for m in model.modules()], model.config.to_dict()
        with pytest.raises(RuntimeError, match="stop"), packed_attention(model) as same:  # noqa: PT012
            assert same is model
            assert model.config._attn_implementation == "tersor_kvcache"
            with packed_attention(model):
                pass
            assert model.config._attn_implementation == "tersor_kvcache"
            raise RuntimeError("stop")
        assert model.config._attn_implementation == before
        assert [m.forward for m in model.modules()] == forwards
        assert model.config.to_dict() == config


def test_models_whose_attention_is_their_own_are_refused(llama, monkeypatch):
    monkeypatch.setattr(type(llama.model), "_supports_sdpa", False)
    own_way = r"LlamaForCausalLM computes its attention \(sdpa\) in a way of its own"
    with pytest.raises(NotImplementedError, match=own_way), packed_attention(llama):
        pass
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_other_attention_sees_decoded_tokens(model, implementation):
    model.set_attn_implementation(implementation)
    cache = CompressedCache(model.config, SMALL)
    forward(model, cache, prompt())
    stray = copy.deepcopy(cache)
    for layer in stray.layers:
        layer.config = SimpleNamespace(_attn_implementation="tersor_kvcache")
    step = prompt(seq_len=3)
    assert torch.equal(forward(model, stray, step), forward(model, cache, step))


# --- histories -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    keys: tuple
    values: tuple
    undo: int = 5


PAIRS = [
    Pair((PerChannel(2, 8), FlushedWindow(16)), (PerToken(3, 4), RecentWindow(16))),
    Pair((PerToken(4, 8), RecentWindow(12)), (PerToken(8, 8), RecentWindow(3))),
    Pair((PerChannel(3, 4), RecentWindow(12)), (PerChannel(1, 6), FlushedWindow(6)), undo=0),
    Pair((PerChannel(5, 8), RecentWindow(0)), (PerChannel(5, 8), RecentWindow(0))),
]


def histories(pair, program, batch, heads):
    """Keys and values after a program: append that many tokens, then take back that share of all (deep: new groups)."""
    streams = [Stream(*stream, pair.undo) for stream in (pair.keys, pair.values)]
    generator = torch.Generator().manual_seed(len(program))
    for num_tokens, share in program:
        for stream in streams:
            x = torch.randn(batch, heads, num_tokens, 8, generator=generator)
            if not stream.length:
                stream.recent = x[:, :, :0]
            seen = stream.append(x, recording=False)
            assert seen.dense().shape[2] == stream.length
            stream.crop(round(share * stream.length))
    return [stream.history() for stream in streams]


def masks(kind, batch, num_heads, queries, seq_len):
    """True: visible. Each query sees the last token, at least."""
    visible = torch.ones(batch, num_heads if kind == "per head" else 1, queries, seq_len, dtype=torch.bool)
    if kind == "causal":
        visible = visible.tril(seq_len - queries)
        visible[0, :, :, : seq_len // 3] = False  # with left padding
    elif kind != "additive":
        visible = torch.rand(visible.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[..., -1] = True
    if kind == "additive":
        return torch.randn(1, 1, 1, seq_len, generator=torch.Generator().manual_seed(0)).expand(-1, -1, queries, -1)
    return visible


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@given(
    program=st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    kind=st.sampled_from([None, "causal", "additive", "per query", "per head"]),
    scaling=st.sampled_from([None, 0.7]),
)
@settings(max_examples=25, deadline=None)
def test_attention_over_codes_equals_attention_over_decoded_tokens(pair, program, sizes, kind, scaling):
    batch, heads, group, queries = sizes
    keys, values = histories(pair, [*program, (queries, 0.0)], batch, heads)
    key, value = keys.dense(), values.dense()
    query = torch.randn(batch, heads * group, queries, 8, generator=torch.Generator().manual_seed(1))
    mask = masks(kind, batch, heads * group, queries, key.shape[2]) if kind else None
    module = SimpleNamespace(num_key_value_groups=group, is_causal=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "MIN_VALUES", 1)
        output, _ = attention.attend(
            module, query, LazyTensor(keys), LazyTensor(values), mask, scaling=scaling, is_causal=False
        )
    repeated = (t.repeat_interleave(group, 1) for t in (key, value))
    reference = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(output.transpose(1, 2), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@given(program=st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=5), share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_part_of_a_history_decodes_as_the_whole(pair, program, share):
    for history in histories(pair, program, 1, 2):
        whole = history.dense()
        start = round(share * whole.shape[2])
        assert torch.equal(history.dense(start), whole[:, :, start:])


def test_after_a_deep_crop_all_codes_are_read(read):
    """Two runs of keys, one of values."""
    keys, values = histories(PAIRS[0], [(100, 0.71), (150, 0.0)], 1, 1)
    assert (len(keys.runs), len(values.runs)) == (2, 1)
    query = torch.randn(1, 1, 1, 8)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "MIN_VALUES", 1)
        attention.attend(SimpleNamespace(is_causal=True), query, LazyTensor(keys), LazyTensor(values), None)
    assert len(read) == 2
    assert sum(read) == min(sum(run[0].shape[2] for run in history.runs) for history in (keys, values))


def test_groups_that_no_longer_start_at_one_token_are_decoded(read):
    """Keys were cut after 10 tokens and values after 13: from there on, no token starts a group of both."""
    codec, x = PerChannel(2, 8), torch.randn(1, 1, 48, 8, generator=torch.Generator().manual_seed(0))
    keys, values = (
        History(codec, (codec.part(codec.encode(x[:, :, :16]), 0, cut), codec.encode(x[:, :, 16:])), cut + 32, x)
        for cut in (10, 13)
    )
    values = History(codec, values.runs, values.encoded, x[:, :, :45])  # as many tokens as keys in all
    query = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "MIN_VALUES", 1)
        output, _ = attention.attend(SimpleNamespace(is_causal=True), query, LazyTensor(keys), LazyTensor(values), None)
    reference = scaled_dot_product_attention(query, keys.dense(), values.dense())
    torch.testing.assert_close(output.transpose(1, 2), reference, rtol=1e-5, atol=1e-5)
    assert read == [10]


def test_lazy_tensors_are_the_tokens_and_are_decoded_once(decoded):
    codec, x = PerChannel(4, 8), torch.randn(1, 2, 16, 8)
    history = History(codec, (codec.encode(x),), 16, x[:, :, :3])
    dense = torch.cat([codec.decode(codec.encode(x), x.dtype), x[:, :, :3]], 2)
    decoded.clear()
    lazy = LazyTensor(history)
    assert (lazy.shape, lazy.dtype, lazy.device) == (dense.shape, dense.dtype, dense.device)
    assert lazy.size(2) == lazy.shape[-2] == 19
    assert not decoded
    for f in (
        lambda t: t.transpose(1, 2),
        lambda t: t[:, :, -1],
        lambda t: t.repeat_interleave(2, 1) * 2,
        lambda t: torch.cat([t, t], 2),
        lambda t: x @ t.mT,
        lambda t: scaled_dot_product_attention(x, t, t),
    ):
        assert type(f(lazy)) is torch.Tensor
        assert torch.equal(f(lazy), f(dense))
    assert decoded == [16]
