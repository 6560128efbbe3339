"""Same tokens as `generate`, in the passes that the drafts deserve."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.decoding import Recipe, recipes, speculate
from tersor.decoding.controller import FixedLength
from tersor.decoding.testing import ScriptedLM
from tersor.decoding.verifier import Greedy, SampleMatch

V = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*no drafted token accepted")


def plain(model, prompt, **settings):
    return model.generate(prompt, **{"do_sample": False, **settings})


def passes_of(model):
    """Counts the model's forwards from outside."""
    counted = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counted, handle


@given(
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=30),
    num_draft=st.integers(1, 12),
    max_ngram=st.integers(1, 4),
    length=st.integers(1, 24),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_equal_those_of_greedy_generate(random_model, prompt, num_draft, max_ngram, length):
    prompt = torch.tensor([prompt])
    counted, handle = passes_of(random_model)
    out = speculate(
        random_model, prompt, recipes.prompt_lookup(num_draft, max_ngram), do_sample=False, max_new_tokens=length
    )
    handle.remove()
    assert torch.equal(out.sequences, plain(random_model, prompt, max_new_tokens=length))
    stats = out.stats
    assert stats.tokens == length == stats.target_passes + stats.accepted
    assert len(counted) == stats.target_passes
    assert sum(counted[1:]) == stats.proposed + stats.target_passes - 1
    assert 0 <= stats.accepted <= stats.proposed


def test_tokens_equal_those_of_greedy_generate_in_float32(random_model):
    model = copy.deepcopy(random_model).float()
    for seed in range(4):
        prompt = torch.randint(0, V, (1, 12), generator=torch.Generator().manual_seed(seed))
        out = speculate(model, prompt, recipes.prompt_lookup(), do_sample=False, max_new_tokens=60)
        assert torch.equal(out.sequences, plain(model, prompt, max_new_tokens=60))


@pytest.mark.parametrize("num_draft", [1, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 8, 17])
def test_a_perfect_drafter_needs_one_pass_for_each_full_draft(num_draft, length, llama, script_drafter):
    prompt = torch.tensor([[1, 2, 3]])
    expected = plain(llama, prompt, max_new_tokens=length)
    recipe = Recipe(script_drafter(tuple(expected[0].tolist())), controller=FixedLength(num_draft))
    out = speculate(llama, prompt, recipe, do_sample=False, max_new_tokens=length)
    assert torch.equal(out.sequences, expected)
    # the prompt's pass gives the first token, each later one its draft and a token of its own
    assert out.stats.target_passes == 1 + -(-(length - 1) // (num_draft + 1))
    assert out.stats.acceptance_rate == (length > 2)


def test_a_drafter_that_is_always_wrong_costs_passes_but_no_token(llama, script_drafter):
    prompt = torch.tensor([[1, 2, 3]])
    expected = plain(llama, prompt, max_new_tokens=20)
    recipe = Recipe(script_drafter(tuple(expected[0].tolist()), shift=1))
    with pytest.warns(UserWarning, match=r"ScriptDrafter\(.*no drafted token accepted"):
        out = speculate(llama, prompt, recipe, do_sample=False, max_new_tokens=20)
    assert torch.equal(out.sequences, expected)
    assert out.stats.target_passes == 20
    assert out.stats.proposed > 100
    assert out.stats.accepted == 0
    assert "0 of" in str(out.stats)


def test_an_accepted_draft_does_not_warn(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speculate(llama, torch.tensor([[1, 2, 3, 1, 2]]), recipes.prompt_lookup(), do_sample=False, max_new_tokens=60)
        speculate(llama, torch.tensor([[1, 2, 3]]), recipes.greedy(), do_sample=False, max_new_tokens=10)


def test_padding_on_the_left_changes_nothing(random_model):
    row = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4]])
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], -1)
    mask = torch.tensor([[0] * 5 + [1] * 12])
    inputs = {"input_ids": ids, "attention_mask": mask}
    out = speculate(random_model, inputs, recipes.prompt_lookup(), do_sample=False, max_new_tokens=30)
    alone = plain(random_model, row, max_new_tokens=30)
    assert torch.equal(out.sequences[:, 5:], alone)


@pytest.mark.parametrize(
    "options", [{}, {"eos_token_id": [3, 5], "pad_token_id": 0}, {"repetition_penalty": 1.2}], ids=str
)
def test_a_batch_in_lockstep_equals_generate(options, random_model):
    rows = [[1, 2, 3, 1, 2, 3, 1], [4, 4, 4], [7, 8, 9, 6, 7, 8, 9, 6, 7]]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }
    out = speculate(random_model, inputs, recipes.prompt_lookup(4, 2), do_sample=False, max_new_tokens=40, **options)
    expected = random_model.generate(**inputs, do_sample=False, max_new_tokens=40, **options)
    assert torch.equal(out.sequences, expected)
    assert out.stats.tokens == expected.shape[1] - width


def test_a_finished_row_does_not_hold_the_batch_back(script_drafter):
    model = ScriptedLM(lambda prefix: prefix[-1] + 1, vocab_size=40, eos_token_id=22)
    drafter = script_drafter(tuple(range(40)), vocab_size=40)
    # row 0 ends at once; the script fits row 1
    prompt = torch.tensor([[20, 21], [0, 1]])
    out = speculate(model, prompt, Recipe(drafter), max_new_tokens=20, pad_token_id=0)
    assert out.sequences.tolist() == [[20, 21, 22] + [0] * 19, list(range(22))]
    assert out.stats.target_passes == 3


def test_custom_generate_equals_speculate(llama):
    prompt, options = torch.tensor([[1, 2, 3] * 4]), {"do_sample": False, "max_new_tokens": 30}
    recipe = recipes.prompt_lookup()
    ids = llama.generate(prompt, custom_generate=recipe, **options)
    as_dict = llama.generate(prompt, custom_generate=recipe, return_dict_in_generate=True, **options)
    out = speculate(llama, prompt, recipe, **options)
    assert torch.equal(ids, out.sequences)
    assert torch.equal(as_dict.sequences, out.sequences)
    assert as_dict.stats == out.stats


def test_custom_generate_takes_a_generator(llama):
    prompt, options = torch.tensor([[1, 2, 3] * 4]), {"do_sample": True, "max_new_tokens": 30}
    one, two = (
        llama.generate(
            prompt, custom_generate=recipes.prompt_lookup(), generator=torch.Generator().manual_seed(7), **options
        )
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_what_is_not_built_says_so(llama):
    prompt, recipe = torch.tensor([[1, 2, 3]]), recipes.prompt_lookup()
    with pytest.raises(NotImplementedError, match="beam_search, speculate does greedy_search and sample"):
        speculate(llama, prompt, recipe, num_beams=2, max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="output_attentions and output_hidden_states are not kept"):
        speculate(llama, prompt, recipe, output_hidden_states=True, max_new_tokens=4)


def test_a_verifier_of_the_other_kind_is_refused(llama):
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"Greedy\(\) needs do_sample=False, but .* do_sample=True"):
        speculate(llama, prompt, Recipe(verifier=Greedy()), do_sample=True, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"SampleMatch\(\) needs do_sample=True"):
        speculate(llama, prompt, Recipe(verifier=SampleMatch()), do_sample=False, max_new_tokens=4)
