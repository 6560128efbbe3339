import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from tersor.decoding import drafter as axis
from tersor.decoding import recipes, speculate
from tersor.decoding.drafter import NgramDrafter
from tersor.decoding.testing import ScriptedLM

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def draft(text, num_draft=6, **fields):
    return NgramDrafter(**fields).start(torch.tensor([text]), None).draft(torch.tensor([text]), num_draft)[0]


def all_drafters():
    return [getattr(axis, name)() for name in axis.__all__]


@pytest.mark.parametrize("drafter", all_drafters(), ids=str)
@given(text=texts, split=st.integers(0, 40), num_draft=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_draft_depends_on_the_text_and_not_on_how_it_arrived(drafter, text, split, num_draft):
    ids = torch.tensor([text])
    model = ScriptedLM(lambda prefix: (sum(prefix) + len(prefix)) % 4, vocab_size=4)
    grown = drafter.start(ids[:, : min(split, len(text))], None, model)
    for end in range(min(split, len(text)), len(text)):
        grown.draft(ids[:, : end + 1], num_draft)
    at_once = drafter.start(ids, None, model).draft(ids, num_draft)
    assert grown.draft(ids, num_draft) == at_once
    assert all(len(row) <= num_draft for row in at_once)


@given(text=texts, max_ngram=st.integers(1, 3), num_draft=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_first_pick_drafts_what_transformers_drafts_up_to_the_end_of_the_text(text, max_ngram, num_draft):
    ids = torch.tensor([text])
    stock = PromptLookupCandidateGenerator(
        num_output_tokens=num_draft, max_matching_ngram_size=max_ngram, max_length=10_000
    )
    theirs = stock.get_candidates(ids)[0][0, len(text) :].tolist()
    ours = draft(text, num_draft, max_ngram=max_ngram, pick="first")
    assert ours[: len(theirs)] == theirs
    assert len(ours) in (0, num_draft)
    assert bool(ours) == bool(theirs)


@given(text=texts, max_ngram=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_latest_pick_copies_after_the_last_occurrence_of_the_longest_suffix(text, max_ngram):
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        starts = [i + n for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if starts:
            expected = list(text)
            for i in range(5):  # reading on into its own copy
                expected.append(expected[starts[-1] + i])
            assert draft(text, 5, max_ngram=max_ngram) == expected[len(text) :]
            return
    assert draft(text, 5, max_ngram=max_ngram) == []


def test_a_loop_is_drafted_at_full_length():
    assert draft([7, 1, 2, 1, 2, 1], num_draft=7) == [2, 1, 2, 1, 2, 1, 2]


def test_padding_is_no_text():
    ids, mask = torch.tensor([[0, 0, 0, 5, 6, 0]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    drafter = NgramDrafter(max_ngram=1)
    assert drafter.start(ids, None).draft(ids, 1) == [[5]]  # a pad's continuation
    assert drafter.start(ids, mask).draft(ids, 1) == [[]]


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_target_as_its_own_draft_model_is_accepted_whole_when_greedy(do_sample, random_model):
    prompt = torch.randint(0, 12, (1, 13), generator=torch.Generator().manual_seed(4))
    options = {"do_sample": do_sample, "max_new_tokens": 25}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = random_model.generate(prompt, **options)
    out = speculate(
        random_model,
        prompt,
        recipes.speculative_decoding(num_draft=5),
        draft_model=random_model,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    assert torch.equal(out.sequences, expected)
    if do_sample:
        assert 0 < out.stats.accepted < out.stats.proposed
    else:
        assert out.stats.acceptance_rate == 1
        assert out.stats.target_passes == 1 + 24 // 6


@pytest.mark.filterwarnings("ignore:.*no drafted token accepted")
def test_another_model_drafts_for_a_padded_batch(random_model, llama):
    ids = torch.tensor([[0, 0, 0, 5, 1, 2, 5, 1], [3, 4, 5, 6, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 3 + [1] * 5, [1] * 8])}
    recipe = recipes.speculative_decoding(3)
    for ending in ({}, {"eos_token_id": 5, "pad_token_id": 0}):
        options = {"do_sample": False, "max_new_tokens": 29, **ending}
        expected = random_model.generate(**inputs, **options)
        for draft_model in (llama, random_model):
            out = speculate(random_model, inputs, recipe, draft_model=draft_model, **options)
            assert torch.equal(out.sequences, expected)
            ids = random_model.generate(**inputs, custom_generate=recipe, draft_model=draft_model, **options)
            assert torch.equal(ids, expected)
        if not ending:
            assert out.stats.acceptance_rate == 1


def test_a_draft_model_reads_each_token_once():
    target = ScriptedLM(lambda prefix: (prefix[-1] + 1) % 7, vocab_size=7)
    # wrong after every 3
    draft = ScriptedLM(lambda prefix: 0 if prefix[-1] == 3 else (prefix[-1] + 1) % 7, vocab_size=7)
    out = speculate(
        target, torch.tensor([[4, 5]]), recipes.speculative_decoding(4), draft_model=draft, max_new_tokens=40
    )
    assert torch.equal(out.sequences, target.generate(torch.tensor([[4, 5]]), max_new_tokens=40))
    assert draft.forwards[0] == 3  # the prompt and the target's first token
    # what the target has put instead of a rejected token, or a whole draft's last token and the one after it
    assert set(draft.forwards[1:]) == {1, 2}


def test_a_draft_model_must_be_there_exactly_when_it_is_used(llama):
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"ModelDrafter\(\) needs a draft model: pass draft_model="):
        speculate(llama, prompt, recipes.speculative_decoding(), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"drafter NgramDrafter\(.*\) uses none"):
        speculate(llama, prompt, recipes.prompt_lookup(), draft_model=llama, max_new_tokens=4)
    large = ScriptedLM(lambda prefix: 0, vocab_size=13)
    with pytest.raises(ValueError, match="knows 13 tokens, the target 12"):
        speculate(llama, prompt, recipes.speculative_decoding(), draft_model=large, max_new_tokens=4)


def test_fields_are_checked():
    with pytest.raises(ValueError, match="max_ngram must be at least 1, got 0"):
        NgramDrafter(max_ngram=0)
    with pytest.raises(ValueError, match="pick must be 'latest' or 'first', got 'last'"):
        NgramDrafter(pick="last")
