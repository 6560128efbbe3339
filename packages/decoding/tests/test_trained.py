"""What only a model that has learnt something can show: copied text is drafted well."""

import pytest
import torch
from transformers import DynamicCache

from tersor.decoding import recipes, speculate

# a class with two like methods, and a second class that has begun to repeat the first
CODE = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def __sub__(self, other):
        return Point(self.x - other.x, self.y - other.y)


class Vector:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        return"""

OPTIONS = {"do_sample": False, "min_new_tokens": 64, "max_new_tokens": 64}


def count_passes(model, generate):
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    sequences = generate()
    handle.remove()
    return sequences, len(passes)


def prompts_with_copies(tokenizer, text):
    def ids(text):
        return tokenizer(text, return_tensors="pt").input_ids

    prose, code = ids(text[:600]), ids(CODE)
    table = ids("\n".join(f"    assert convert({i}) == {i * i}" for i in range(1, 9)) + "\n")
    return [code, torch.cat([code, code, code[:, :20]], -1), torch.cat([prose, prose[:, :40]], -1), table]


def test_repetitive_text_takes_at_most_seven_tenths_of_the_passes(tiny_lm, tiny_lm_tokenizer, held_out_text):
    plain = ours = accepted = proposed = 0
    for prompt in prompts_with_copies(tiny_lm_tokenizer, held_out_text):
        expected, passes = count_passes(tiny_lm, lambda p=prompt: tiny_lm.generate(p, **OPTIONS))
        plain += passes
        out, passes = count_passes(tiny_lm, lambda p=prompt: speculate(tiny_lm, p, recipes.prompt_lookup(), **OPTIONS))
        ours += passes
        assert torch.equal(out.sequences, expected)
        assert passes == out.stats.target_passes
        accepted += out.stats.accepted
        proposed += out.stats.proposed
    assert plain == 4 * 64
    assert ours <= 0.7 * plain
    assert accepted > 0.1 * proposed


def test_the_latest_occurrence_needs_no_more_passes_than_transformers_first_one(
    tiny_lm, tiny_lm_tokenizer, held_out_text
):
    lookup = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}
    ours = theirs = 0
    for prompt in prompts_with_copies(tiny_lm_tokenizer, held_out_text):
        theirs += count_passes(tiny_lm, lambda p=prompt: tiny_lm.generate(p, **lookup, **OPTIONS))[1]
        ours += speculate(tiny_lm, prompt, recipes.prompt_lookup(), **OPTIONS).stats.target_passes
    assert ours <= theirs


@pytest.mark.slow
def test_float32_prose_shows_no_flip_beyond_the_rounding_of_several_positions(
    tiny_lm, tiny_lm_tokenizer, held_out_text
):
    ids = tiny_lm_tokenizer(held_out_text[:20_000], return_tensors="pt").input_ids
    for start in range(0, 3200, 160):
        prompt = ids[:, start : start + 160]
        out = speculate(tiny_lm, prompt, recipes.prompt_lookup(), **OPTIONS)
        assert torch.equal(out.sequences, tiny_lm.generate(prompt, **OPTIONS))


def test_bfloat16_differs_only_where_the_best_two_scores_are_within_rounding(tiny_lm, tiny_lm_tokenizer, held_out_text):
    model = tiny_lm.bfloat16()
    for prompt in prompts_with_copies(tiny_lm_tokenizer, held_out_text):
        out = speculate(model, prompt, recipes.prompt_lookup(), **OPTIONS)
        # the same tokens one by one: the prefix is ours, so one flip does not hide the next
        cache, gaps = DynamicCache(config=model.config), []
        for end in range(prompt.shape[1], out.sequences.shape[1]):
            read = cache.get_seq_length()
            logits = model(out.sequences[:, read:end], past_key_values=cache).logits[0, -1].float()
            token = out.sequences[0, end]
            allowed = logits.clone()
            allowed[model.config.eos_token_id] = -torch.inf  # min_new_tokens
            gaps.append((allowed.max() - allowed[token]) / logits.abs().max())
        assert max(gaps) <= 2**-5  # bfloat16 rounds at 2**-9, a score has passed a few dozen roundings in six layers


@pytest.fixture(scope="session")
def tiny_draft(zoo):
    if "tiny-draft" not in zoo.names():
        pytest.skip("tiny-draft is not in the zoo")
    return zoo.load_model("tiny-draft")


def test_a_distilled_draft_saves_passes_where_nothing_repeats(tiny_lm, tiny_draft, tiny_lm_tokenizer, held_out_text):
    ids = tiny_lm_tokenizer(held_out_text[:20_000], return_tensors="pt").input_ids
    recipe, passes = recipes.speculative_decoding(num_draft=4), 0
    for start in range(0, 4000, 1000):
        prompt = ids[:, start : start + 100]
        out = speculate(tiny_lm, prompt, recipe, draft_model=tiny_draft, **OPTIONS)
        assert torch.equal(out.sequences, tiny_lm.generate(prompt, **OPTIONS))
        passes += out.stats.target_passes
    assert passes <= 0.5 * 4 * 64
