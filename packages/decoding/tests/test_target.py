"""The cache is taken back exactly, and given back as it was."""

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import QuantizedLayer

from tersor.decoding import Recipe, recipes, speculate
from tersor.decoding.controller import Heuristic
from tersor.decoding.drafter import NgramDrafter
from tersor.decoding.testing import ScriptedLM

V = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*no drafted token accepted")


def plain(model, prompt, **settings):
    return model.generate(prompt, **{"do_sample": False, **settings})


def test_the_cache_ends_as_a_prefill_of_the_committed_tokens(random_model):
    prompt = torch.randint(0, V, (1, 14), generator=torch.Generator().manual_seed(3))
    out = speculate(random_model, prompt, recipes.prompt_lookup(), do_sample=False, max_new_tokens=30)
    fresh = DynamicCache(config=random_model.config)
    random_model(out.sequences[:, :-1], past_key_values=fresh)
    assert out.stats.accepted < out.stats.proposed  # something had to be taken back
    for ours, theirs in zip(out.past_key_values.layers, fresh.layers):
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-12)
        assert not getattr(ours, "record_past", False)


@pytest.mark.parametrize("kind", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_a_cache_that_is_handed_in_is_used_and_carries_on(kind, random_model):
    prompt = torch.randint(0, V, (1, 10), generator=torch.Generator().manual_seed(8))
    more = torch.randint(0, V, (1, 4), generator=torch.Generator().manual_seed(9))
    results = []
    for recipe in (None, recipes.prompt_lookup()):
        cache = kind(random_model.config)
        options = {"do_sample": False, "past_key_values": cache, "custom_generate": recipe}
        first = random_model.generate(prompt, max_new_tokens=20, **options)
        assert cache.get_seq_length() == first.shape[1] - 1
        second = random_model.generate(torch.cat([first, more], -1), max_new_tokens=20, **options)
        results.append(second)
    assert torch.equal(*results)


def test_recording_is_switched_off_again_after_an_exception(random_model):
    class Bomb(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > 20:
                raise KeyError("bomb")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    cache = DynamicCache(config=random_model.config)
    with pytest.raises(KeyError, match="bomb"):
        speculate(
            random_model,
            torch.tensor([[1, 2, 3] * 5]),
            recipes.prompt_lookup(),
            do_sample=False,
            max_new_tokens=20,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([Bomb()]),
        )
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)


def test_a_cache_that_cannot_be_cropped_is_refused_with_the_way_out(llama):
    prompt = torch.tensor([[1, 2, 3]])
    static = StaticCache(config=llama.config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticCache cannot undo.*StaticLayer.*cache_implementation='dynamic'"):
        speculate(llama, prompt, recipes.prompt_lookup(), max_new_tokens=4, past_key_values=static)
    with pytest.raises(ValueError, match="needs a cache"):
        speculate(llama, prompt, recipes.prompt_lookup(), max_new_tokens=4, use_cache=False)
    # without drafts there is nothing to undo
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        out = speculate(llama, prompt, recipes.greedy(), do_sample=False, max_new_tokens=4, **options)
        assert torch.equal(out.sequences, plain(llama, prompt, max_new_tokens=4))


def test_a_quantised_layer_is_refused_although_it_inherits_crop(llama):
    class Rounded(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, q_tensor):
            return q_tensor

    cache = Cache(layers=[Rounded(), Rounded()])
    with pytest.raises(ValueError, match=r"Rounded \(2 of 2 layers\) is not croppable"):
        speculate(llama, torch.tensor([[1, 2, 3]]), recipes.prompt_lookup(), max_new_tokens=4, past_key_values=cache)


def test_a_cache_whose_crop_does_nothing_is_found_out(llama, script_drafter):
    class Stubborn(DynamicCache):
        def crop(self, tokens_to_remove):
            pass

    wrong = Recipe(script_drafter((0,) * 30, shift=1))
    with pytest.raises(RuntimeError, match=r"Stubborn.crop\(-\d+\) left"):
        speculate(llama, torch.tensor([[1, 2, 3]]), wrong, max_new_tokens=20, past_key_values=Stubborn())


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"cache_implementation": "dynamic"}], ids=str)
def test_the_prompt_is_read_as_generate_reads_it(options, random_model):
    prompt = torch.randint(0, V, (1, 17), generator=torch.Generator().manual_seed(2))
    out = speculate(random_model, prompt, recipes.prompt_lookup(), do_sample=False, max_new_tokens=20, **options)
    assert torch.equal(out.sequences, plain(random_model, prompt, max_new_tokens=20))


def test_a_prompt_of_embeddings_is_decoded_too(random_model):
    embeds = random_model.get_input_embeddings()(torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]]))
    options = {"inputs_embeds": embeds, "do_sample": False, "max_new_tokens": 30}
    assert torch.equal(
        random_model.generate(custom_generate=recipes.prompt_lookup(), **options), random_model.generate(**options)
    )


def test_the_model_reads_only_what_the_cache_holds():
    # the next token is the number of tokens so far: any wrong crop shows at once
    model = ScriptedLM(lambda prefix: (len(prefix) * prefix[-1] + sum(prefix)) % 5, vocab_size=5)
    prompt = torch.tensor([[1, 2, 3, 4]])
    out = speculate(model, prompt, Recipe(NgramDrafter(1), controller=Heuristic()), max_new_tokens=80)
    assert 0 < out.stats.accepted < out.stats.proposed
    assert torch.equal(out.sequences, plain(model, prompt, max_new_tokens=80))
