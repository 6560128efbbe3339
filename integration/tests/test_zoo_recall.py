"""Recall prompts: what they ask for stands in their context, once, and nothing but the context tells it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.integration import zoo
from tersor.integration.zoo.recall import KINDS, Recall, words


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_tokenizer):
    return tiny_lm_tokenizer


@pytest.fixture(scope="module")
def recall(tokenizer):
    return Recall(tokenizer, tokenizer(zoo.held_out_text(), add_special_tokens=False, verbose=False).input_ids)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS), length=st.integers(48, 1024), seed=st.integers(0, 1000), questions=st.integers(1, 4)
)
def test_prompts_fit_their_length_and_answers_are_words(recall, kind, length, seed, questions):
    prompt = recall.prompt(kind, length, [seed], questions)
    assert length - 40 <= len(prompt.ids) <= length
    assert {prompt.ids[place] for place in prompt.answers} <= set(recall.words.tolist())
    assert 0 < prompt.chance <= 1
    if kind != "copy":
        assert len(prompt.answers) == questions


@settings(deadline=None)
@given(kind=st.sampled_from(["records", "needles"]), length=st.integers(48, 1024), seed=st.integers(0, 1000))
def test_each_question_has_one_record_that_answers_it(recall, kind, length, seed):
    prompt = recall.prompt(kind, length, [seed], 2)
    context = prompt.ids[: prompt.answers[0] - 1]
    for place in prompt.answers:
        key, value = prompt.ids[place - 1], prompt.ids[place]
        followed_by = [
            context[i + 1]
            for i in range(len(context) - 2)
            if context[i] == key and context[i - 1] in (recall.newline, recall.bos) and context[i + 2] == recall.newline
        ]
        assert followed_by == [value]


@settings(deadline=None)
@given(length=st.integers(32, 1024), seed=st.integers(0, 1000))
def test_a_copy_repeats_the_list(recall, length, seed):
    prompt = recall.prompt("copy", length, [seed])
    answers = [prompt.ids[place] for place in prompt.answers]
    assert answers == prompt.ids[1 : 1 + len(answers)]
    assert prompt.ids[prompt.answers[0] - len(recall.again) : prompt.answers[0]] == recall.again


def test_same_seed_same_prompt(recall):
    for kind in KINDS:
        assert recall.prompt(kind, 128, [1, 2]) == recall.prompt(kind, 128, [1, 2])
        assert recall.prompt(kind, 128, [1, 2]) != recall.prompt(kind, 128, [1, 3])


def test_needles_stand_anywhere_in_the_prose(recall):
    """A method that keeps only the last tokens must miss some, and one that keeps only the first as well."""
    places = []
    for seed in range(200):
        prompt = recall.prompt("needles", 512, [seed])
        key = prompt.ids[prompt.answers[0] - 1]
        places.append(prompt.ids.index(key) / len(prompt.ids))
    assert min(places) < 0.15
    assert max(places) > 0.8
    assert 0.35 < np.mean(places) < 0.6


def test_words_are_tokens_of_their_own(tokenizer):
    for word in words(tokenizer)[::50].tolist():
        text = tokenizer.decode([word])
        assert text[0] == " "
        assert tokenizer(text, add_special_tokens=False).input_ids == [word]
