import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen3NextConfig, T5Config, set_seed

from tersor.kvcache import CompressedCache, Recipe, recipes
from tersor.kvcache.cache import UnsupportedModel
from tersor.kvcache.codec import FullPrecision, PerChannel
from tersor.kvcache.window import FlushedWindow

GREEDY = {"do_sample": False, "max_new_tokens": 24}
RECIPES = [
    recipes.full(),
    recipes.kivi(4, group_size=8, residual_length=16),
    recipes.kivi(2, group_size=16, residual_length=32),
]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=["full", "kivi4", "kivi2"])
FINE = recipes.kivi(8, group_size=8, residual_length=16)


def prompt(batch=1, seq_len=70, seed=0):
    return torch.randint(2, 128, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def states(cache):
    """What attention would see in each layer, and how many bytes that takes."""
    return [t.clone() for layer in cache.layers for t in layer.dense()]


def assert_equal(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@torch.no_grad()
def forward(model, cache, ids, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


@torch.no_grad()
def random_states(cache, steps, seed=0, batch=1):
    """Updates every layer with random keys and values, in the given steps; returns what it got."""
    generator = torch.Generator().manual_seed(seed)
    for num_tokens in steps:
        for layer_idx in range(len(cache)):
            keys, values = torch.randn(2, batch, 2, num_tokens, 32, generator=generator)
            cache.update(keys, values, layer_idx)


# --- it is a cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[70], [1] * 30, [20, 1, 1, 30, 5]], ids=["one", "tokens", "chunks"])
def test_full_is_bit_equal_to_dynamic_cache(model, steps):
    cache, dense = CompressedCache(model.config, recipes.full()), DynamicCache(config=model.config)
    for part in prompt(seq_len=sum(steps)).split(steps, 1):
        assert torch.equal(forward(model, cache, part), forward(model, dense, part))
    assert cache.nbytes == cache.stats.dense_nbytes
    assert cache.nbytes == sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values))


def test_kivi_is_bit_equal_to_dynamic_cache_until_the_window_is_full(model):
    cache = CompressedCache(model.config, recipes.kivi(2, residual_length=96))
    dense = DynamicCache(config=model.config)
    for part in prompt(seq_len=96).split([60] + 36 * [1], 1):
        assert torch.equal(forward(model, cache, part), forward(model, dense, part))
    assert cache.stats.encoded_keys == 96
    assert not torch.equal(forward(model, cache, prompt(seq_len=1)), forward(model, dense, prompt(seq_len=1)))


def test_eight_bits_change_logits_by_a_thousandth(model):
    cache, dense = CompressedCache(model.config, FINE), DynamicCache(config=model.config)
    for part in prompt(seq_len=200).split([100] + 20 * [5], 1):
        logits, reference = forward(model, cache, part), forward(model, dense, part)
    assert cache.stats.encoded_keys == 192
    # 8 bits: half a step is 1/510 of a group's range
    assert (logits - reference).norm() < 2e-3 * reference.norm()


@each_recipe
def test_lengths_and_masks_are_those_of_dynamic_cache(model, recipe):
    cache, dense = CompressedCache(model.config, recipe), DynamicCache(config=model.config)
    for num_tokens in [0, 5, 1, 18, 1, 60, 1]:
        if num_tokens:
            random_states(cache, [num_tokens])
            random_states(dense, [num_tokens])
        for layer_idx in range(len(cache)):
            assert cache.get_seq_length(layer_idx) == dense.get_seq_length(layer_idx)
            for query_length in (1, 4, 40):
                sizes = cache.get_mask_sizes(query_length, layer_idx)
                assert sizes == dense.get_mask_sizes(query_length, layer_idx)
        assert cache.is_sliding == dense.is_sliding
        assert cache.get_max_length() == dense.get_max_length()
    assert not cache.is_compileable
    assert cache.is_croppable


@pytest.mark.parametrize("chunk", [3, 30])
def test_sliding_layers_return_what_dynamic_cache_returns(gemma3, chunk):
    cache, dense = CompressedCache(gemma3.config, FINE), DynamicCache(config=gemma3.config)
    for seed in range(12):
        keys, values = torch.randn(2, 1, 2, chunk, 32, generator=torch.Generator().manual_seed(seed))
        assert_equal(cache.update(keys, values, 0), dense.update(keys, values, 0))


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_with_full_gives_the_same_tokens(model):
    ids = prompt(batch=2)
    for kwargs in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ):
        outputs = []
        for cache in (CompressedCache(model.config, recipes.full()), DynamicCache(config=model.config)):
            set_seed(0)
            outputs.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, **kwargs))
        assert torch.equal(*outputs)


@each_recipe
def test_a_beam_is_scored_as_if_it_were_alone(model, recipe):
    """Beams that were reordered on their way carry their own codes: one forced through a new cache has its logits."""
    ids = prompt()
    cache = CompressedCache(model.config, recipe)
    output = model.generate(
        ids, past_key_values=cache, max_new_tokens=24, num_beams=3, num_return_sequences=2, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices, normalize_logits=False
    )
    for sequence, score in zip(output.sequences, scores):
        alone, logits = CompressedCache(model.config, recipe), []
        for part in sequence[None, :-1].split([70] + 23 * [1], 1):
            logits.append(forward(model, alone, part)[:, -1:])
        chosen = torch.cat(logits, 1).log_softmax(-1)[0].gather(1, sequence[70:, None])[:, 0]
        assert (chosen.cumsum(0)[-1] - score[score != 0].sum()).abs() < 2e-3


@each_recipe
def test_prompt_lookup_takes_back_what_was_rejected(model, recipe):
    """The state after assisted decoding is that of its tokens; with `full`, the tokens are those of greedy decoding."""
    ids = prompt(seq_len=20).repeat(1, 4)
    cache = CompressedCache(model.config, recipe)
    output = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=5, **GREEDY)
    assert cache.get_seq_length() == output.shape[1] - 1
    if recipe == recipes.full():
        assert torch.equal(output, model.generate(ids, **GREEDY))
    # layer 0 depends on tokens and positions only, so its states can be computed anew
    again = CompressedCache(model.config, recipe)
    forward(model, again, output[:, :-1])
    for x, y in zip(cache.layers[0].dense(), again.layers[0].dense()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    if not cache.is_sliding[0]:
        assert [s.encoded for s in cache.layers[0].streams] == [s.encoded for s in again.layers[0].streams]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_with_full_precision_changes_nothing(model, attention):
    model.set_attn_implementation(attention)
    check_left_padding(model, recipes.full(), rtol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("bits", [8, 4])
def test_left_padding_changes_no_more_than_other_group_boundaries_do(model, bits):
    """Padding shifts a row's tokens against the groups, and the group with the last padding takes its range from it."""
    check_left_padding(model, recipes.kivi(bits, group_size=8, residual_length=16), rtol=0.1 * 2.0**-bits)


def check_left_padding(model, recipe, rtol):
    ids, num_padded = prompt(batch=2, seq_len=90), 37
    mask = torch.ones_like(ids)
    ids[0, :num_padded] = mask[0, :num_padded] = 0
    batch, alone = CompressedCache(model.config, recipe), CompressedCache(model.config, recipe)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(80, 90):
        start = 0 if step == 80 else step
        together = forward(
            model, batch, ids[:, start : step + 1], attention_mask=mask[:, : step + 1],
            position_ids=positions[:, start : step + 1],
        )  # fmt: skip
        single = forward(model, alone, ids[:1, max(start, num_padded) : step + 1])
        assert together[:, num_padded:].isfinite().all()
        difference = together[0, -1] - single[0, -1]
        assert difference.norm() < rtol * single[0, -1].norm()


# --- crop ----------------------------------------------------------------------------------------------------------


@each_recipe
def test_after_crop_logits_are_those_without_the_tokens(model, recipe):
    recipe = Recipe(recipe.key_codec, recipe.value_codec, recipe.key_window, recipe.value_window, undo=12)
    cache, never = CompressedCache(model.config, recipe), CompressedCache(model.config, recipe)
    ids, other = prompt(seq_len=150), prompt(seq_len=12, seed=1)
    for step in (70, 75, 96, 100, 101, 128, 140, 150):
        part = ids[:, cache.get_seq_length() : step]
        assert torch.equal(forward(model, cache, part), forward(model, never, part))
        forward(model, cache, other)
        cache.crop(-12)
        assert cache.get_seq_length() == step
        assert_equal(states(cache), states(never))


@each_recipe
def test_recording_makes_any_crop_exact(model, recipe):
    cache, never = CompressedCache(model.config, recipe), CompressedCache(model.config, recipe)
    ids = prompt(seq_len=60)
    forward(model, cache, ids)
    forward(model, never, ids)
    cache.activate_past_recording()
    forward(model, cache, prompt(seq_len=80, seed=1))
    cache.crop(-80)
    assert_equal(states(cache), states(never))
    assert torch.equal(forward(model, cache, ids[:, :1]), forward(model, never, ids[:, :1]))


def test_crop_takes_what_transformers_take(llama):
    cache = CompressedCache(llama.config, FINE)
    cache.crop(-3)  # nothing there
    random_states(cache, [50])
    before = states(cache)
    cache.crop(0)
    assert_equal(states(cache), before)
    cache.crop(-3)
    assert cache.get_seq_length() == 47
    cache.crop(100)  # a positive number: how many stay
    assert cache.get_seq_length() == 47
    cache.crop(40)
    assert cache.get_seq_length() == 40
    cache.crop(-100)
    assert cache.get_seq_length() == cache.nbytes == 0


def test_a_window_that_cannot_go_back_refuses_and_changes_nothing(gemma3):
    cache = CompressedCache(gemma3.config, FINE)
    random_states(cache, [100])
    before = states(cache)
    with pytest.raises(ValueError, match=r"layer 0 \(SlidingLayer\) can take back 16 tokens, not 17: .* undo=17"):
        cache.crop(-17)
    assert_equal(states(cache), before)
    cache.crop(-16)
    assert cache.get_seq_length() == 84


# --- the batch -----------------------------------------------------------------------------------------------------


@each_recipe
def test_batch_operations_move_whole_rows(model, recipe):
    cache = CompressedCache(model.config, recipe)
    random_states(cache, [100, 1, 1], batch=3)
    before = states(cache)
    for operation, index in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        other = copy.deepcopy(cache)
        operation(other)
        assert_equal(states(other), [t[index] for t in before])
        assert other.nbytes * 3 == cache.nbytes * len(index)
        # and it goes on: what full precision was kept for an undo has moved too
        other.activate_past_recording()
        random_states(other, [20], batch=len(index))
        other.crop(-20)
        assert_equal(states(other), [t[index] for t in before])
    assert_equal(states(cache), before)


@each_recipe
def test_reset_starts_anew(model, recipe):
    cache, new = CompressedCache(model.config, recipe), CompressedCache(model.config, recipe)
    cache.activate_past_recording()
    random_states(cache, [100])
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    random_states(cache, [40, 1], batch=2)
    random_states(new, [40, 1], batch=2)
    assert_equal(states(cache), states(new))
    assert cache.nbytes == new.nbytes


def test_empty_caches_take_every_operation(model):
    cache = CompressedCache(model.config, FINE)
    cache.reset()
    cache.crop(0)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.nbytes == cache.get_seq_length() == 0
    assert cache.stats == (0, 0, 0, 0, 0)


def test_early_initialization_changes_nothing(model):
    cache, lazy = CompressedCache(model.config, FINE), CompressedCache(model.config, FINE)
    cache.early_initialization(1, 2, 32, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    random_states(cache, [50])
    random_states(lazy, [50])
    assert_equal(states(cache), states(lazy))


# --- bytes ---------------------------------------------------------------------------------------------------------


def counted_by_hand(seq_len, bits, group, window, undo, heads=2, dim=32, itemsize=4):
    """Bytes of one full-attention layer, from the definition: codes, two 16-bit numbers per group, full precision."""
    keys = values = seq_len // window * window
    kept_keys = seq_len - max(0, seq_len - undo) // window * window
    kept_values = seq_len - max(0, seq_len - undo - window)
    codes = (keys + values) * dim * bits // 8
    scales = keys // group * dim * 4 + values * dim // group * 4
    return heads * (codes + scales + (kept_keys + kept_values) * dim * itemsize)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seq_len", [10, 63, 64, 70, 300])
def test_nbytes_are_those_counted_by_hand(llama, seq_len, bits):
    cache = CompressedCache(llama.config, recipes.kivi(bits, group_size=16, residual_length=64))
    random_states(cache, [seq_len // 2] + [1] * (seq_len - seq_len // 2))
    assert cache.nbytes == 2 * counted_by_hand(seq_len, bits, 16, 64, undo=16)
    assert cache.nbytes == sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors_of(cache)}.values())


def tensors_of(cache):
    """Every tensor reachable from the cache, found without its help."""
    found, todo, seen = [], [cache], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return found


def test_four_bits_take_under_a_third_of_bfloat16_when_sequences_are_long(llama):
    cache = CompressedCache(llama.config, recipes.kivi(bits=4))
    for layer_idx in range(2):
        keys, values = torch.randn(2, 1, 2, 8192, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        cache.update(keys, values, layer_idx)
    stats = cache.stats
    assert stats.dense_nbytes == 2 * 2 * 2 * 8192 * 32 * 2
    assert stats.nbytes / stats.dense_nbytes < 0.33  # (4 + 2 * 16 / 32) / 16 = 0.3125, and the windows


def test_a_copy_is_independent(model):
    cache = CompressedCache(model.config, FINE)
    random_states(cache, [100])
    before, other = states(cache), copy.deepcopy(cache)
    random_states(other, [50])
    other.crop(-10)
    assert_equal(states(cache), before)


# --- errors --------------------------------------------------------------------------------------------------------


def test_models_with_other_layers_are_named():
    with pytest.raises(
        UnsupportedModel, match=r"qwen3_next: layers of type linear_attention \(3 of 4\) .* full_attention"
    ):
        CompressedCache(Qwen3NextConfig(num_hidden_layers=4), recipes.kivi())
    with pytest.raises(UnsupportedModel, match="t5: encoder-decoder models are not supported"):
        CompressedCache(T5Config(), recipes.kivi())
    with pytest.raises(UnsupportedModel, match=r"mistral: none of its 4 layers is of type full_attention"):
        CompressedCache(MistralConfig(num_hidden_layers=4, sliding_window=64), recipes.kivi())
    CompressedCache(MistralConfig(num_hidden_layers=4, sliding_window=64), recipes.full())


def test_models_that_share_caches_between_layers_are_named():
    from transformers import Gemma3nTextConfig

    with pytest.raises(UnsupportedModel, match=r"gemma3n_text: layers of type dummy \(15 of 35\)"):
        CompressedCache(Gemma3nTextConfig(), recipes.kivi())


def test_groups_that_do_not_fit_are_named():
    config = LlamaConfig(hidden_size=160, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"value_codec PerToken.*head_dim = 80 .* group_size = 32; use group_size=20"):
        CompressedCache(config, recipes.kivi())
    CompressedCache(config, recipes.kivi(group_size=16))
    # what the config does not tell shows at the first tokens
    cache = CompressedCache(LlamaConfig(num_hidden_layers=1), recipes.kivi())
    with pytest.raises(ValueError, match="head_dim = 24 is not a multiple"):
        cache.update(torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 24), 0)


def test_windows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"residual_length must be a multiple of the 32 tokens .*; use 96 or 128"):
        recipes.kivi(residual_length=100)
    with pytest.raises(ValueError, match="use 32 or 32"):
        Recipe(PerChannel(4, 32), FullPrecision(), key_window=FlushedWindow(10))
    with pytest.raises(ValueError, match="undo must be 0 or more tokens, got -1"):
        Recipe(undo=-1)


def test_a_recipe_that_was_not_called_is_named(llama):
    with pytest.raises(TypeError, match=r"recipe must be a Recipe such as recipes.kivi\(\), got <function kivi"):
        CompressedCache(llama.config, recipes.kivi)


def test_offloading_is_refused(llama):
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        CompressedCache(llama.config, FINE).offload(0)
