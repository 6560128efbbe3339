"""Whatever looks at the prefix sees what it would see in the plain loop: processors, stopping criteria, streamers."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tersor.decoding import Recipe, recipes, speculate
from tersor.decoding.controller import FixedLength
from tersor.decoding.testing import ScriptedLM

V = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*no drafted token accepted")


def plain(model, prompt, **settings):
    return model.generate(prompt, **{"do_sample": False, **settings})


def test_end_of_sequence_inside_an_accepted_draft_ends_the_run(script_drafter):
    model = ScriptedLM(lambda prefix: prefix[-1] + 1, vocab_size=30, eos_token_id=9)
    drafter = script_drafter(tuple(range(30)), vocab_size=30)
    out = speculate(model, torch.tensor([[0, 1]]), Recipe(drafter), max_new_tokens=25)
    assert out.sequences.tolist() == [list(range(10))]
    # the draft stops at the end token: one position for the last token, seven for 3 ... 9
    assert model.forwards == [2, 8]


@pytest.mark.parametrize("length", range(1, 9))
def test_the_draft_never_overshoots_the_maximum_length(length, script_drafter):
    model = ScriptedLM(lambda prefix: prefix[-1] + 1, vocab_size=30)
    drafter = script_drafter(tuple(range(30)), vocab_size=30)
    out = speculate(model, torch.tensor([[0, 1]]), Recipe(drafter, controller=FixedLength(4)), max_new_tokens=length)
    assert out.sequences.tolist() == [list(range(2 + length))]
    assert sum(model.forwards) == 2 + length - 1  # no position beyond the last one was computed


def test_a_stopping_criterion_cuts_inside_a_draft(script_drafter):
    class AtSix(StoppingCriteria):
        asked = ()

        def __call__(self, input_ids, scores, **kwargs):
            self.asked += (input_ids.shape[1],)
            return input_ids[:, -1] == 6

    model = ScriptedLM(lambda prefix: prefix[-1] + 1, vocab_size=30)
    criterion = AtSix()
    out = speculate(
        model,
        torch.tensor([[0, 1]]),
        Recipe(script_drafter(tuple(range(30)), vocab_size=30)),
        max_new_tokens=25,
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    assert out.sequences.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert criterion.asked == (3, 4, 5, 6, 7)  # after each token, as in the plain loop
    assert out.past_key_values.get_seq_length() == 6
    assert out.stats.tokens == 5


class Counting(LogitsProcessor):
    """Stateful: forbids a token that depends on how often it was called, and on the prefix."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        scores[:, len(self.calls) % V] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 15, "eos_token_id": 5},
        {"eos_token_id": [3, 5]},
        {"bad_words_ids": [[4], [2, 3]]},
        {"forced_eos_token_id": 7},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [i for i in range(V) if (i + len(ids)) % 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_draft", [1, 8])
def test_processors_see_each_prefix(options, num_draft, random_model):
    recipe = recipes.prompt_lookup(num_draft)
    for seed in range(2):
        prompt = torch.randint(0, V, (1, 12), generator=torch.Generator().manual_seed(seed))
        out = speculate(random_model, prompt, recipe, do_sample=False, max_new_tokens=24, **options)
        assert torch.equal(out.sequences, plain(random_model, prompt, max_new_tokens=24, **options))


def test_a_stateful_processor_is_called_as_in_the_plain_loop(llama):
    prompt = torch.tensor([[1, 2, 3] * 4])
    ours, theirs = Counting(), Counting()
    out = speculate(
        llama,
        prompt,
        recipes.prompt_lookup(),
        do_sample=False,
        max_new_tokens=40,
        logits_processor=LogitsProcessorList([ours]),
    )
    expected = plain(llama, prompt, max_new_tokens=40, logits_processor=LogitsProcessorList([theirs]))
    assert torch.equal(out.sequences, expected)
    assert ours.calls == theirs.calls


def test_scores_and_logits_are_one_per_token(llama):
    options = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2, "max_new_tokens": 30}
    prompt = torch.tensor([[1, 2, 3] * 4])
    out = speculate(llama, prompt, recipes.prompt_lookup(), do_sample=False, **options)
    expected = plain(llama, prompt, return_dict_in_generate=True, **options)
    for name in ("scores", "logits"):
        ours, theirs = out[name], expected[name]
        assert len(ours) == len(theirs) == 30
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-5)  # float32 copies


class Tape(BaseStreamer):
    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ends += 1


def test_a_streamer_gets_what_generate_gives_it(llama):
    prompt, ours, theirs = torch.tensor([[1, 2, 3] * 4]), Tape(), Tape()
    out = speculate(llama, prompt, recipes.prompt_lookup(), streamer=ours, do_sample=False, max_new_tokens=30)
    plain(llama, prompt, streamer=theirs, max_new_tokens=30)
    assert out.stats.accepted
    assert (ours.values, ours.ends) == (theirs.values, theirs.ends)
