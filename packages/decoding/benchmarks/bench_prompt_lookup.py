"""Tokens per second of one greedy answer: plain generate, transformers' prompt lookup, ours.

pytest packages/decoding/benchmarks/bench_prompt_lookup.py --benchmark-only --benchmark-group-by=param:text
"""

import pytest
import torch

from tersor.decoding import recipes, speculate

NEW = 96


@pytest.fixture(params=["repeated", "prose"])
def text(request):
    return request.param


@pytest.fixture
def prompt(text, tiny_lm_tokenizer, held_out_text):
    """About 200 tokens: a passage that has been begun a second time, or one that has not."""
    ids = tiny_lm_tokenizer(held_out_text, return_tensors="pt").input_ids[:, :160]
    return torch.cat([ids, ids[:, :40]], -1) if text == "repeated" else ids


DECODERS = {
    "generate": lambda model, prompt, **options: model.generate(prompt, **options),
    "transformers_lookup": lambda model, prompt, **options: model.generate(
        prompt, prompt_lookup_num_tokens=10, max_matching_ngram_size=3, **options
    ),
    "prompt_lookup": lambda model, prompt, **options: (
        speculate(model, prompt, recipes.prompt_lookup(), **options).sequences
    ),
}


@pytest.mark.filterwarnings("ignore:.*no drafted token accepted")
@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_answer(benchmark, decoder, tiny_lm, prompt):
    options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
    forwards = []
    tiny_lm.register_forward_pre_hook(lambda *_: forwards.append(1))
    sequences = benchmark.pedantic(
        DECODERS[decoder], (tiny_lm, prompt), options, rounds=5, warmup_rounds=1, iterations=1
    )
    assert torch.equal(sequences, tiny_lm.generate(prompt, **options))
    benchmark.extra_info["tokens_per_second"] = round(NEW / benchmark.stats.stats.median, 1)
    benchmark.extra_info["target_passes"] = (len(forwards) - NEW) // 6
