"""Sampling with drafts is sampling."""

import pytest
import torch

from tersor.decoding import recipes, speculate
from tersor.decoding.verifier import SampleMatch

V = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*no drafted token accepted")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.8, "repetition_penalty": 1.2}], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
def test_sampling_with_one_seed_gives_the_tokens_of_generate(options, batch, random_model):
    accepted = 0
    for seed in range(3):
        prompt = torch.randint(0, 4, (batch, 12), generator=torch.Generator().manual_seed(seed))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = random_model.generate(prompt, do_sample=True, max_new_tokens=30, **options)
        generator = torch.Generator().manual_seed(seed)
        out = speculate(
            random_model,
            prompt,
            recipes.prompt_lookup(),
            generator=generator,
            do_sample=True,
            max_new_tokens=30,
            **options,
        )
        assert torch.equal(out.sequences, expected)
        accepted += out.stats.accepted
    assert accepted


def test_a_drafted_token_is_kept_as_often_as_the_target_says_it(generator):
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    draws = SampleMatch().verify(logits.expand(20_000, 3), generator)
    frequency = draws.bincount(minlength=3) / 20_000
    # 4 standard errors
    assert ((frequency - logits.exp()).abs() < 4 * (logits.exp() * (1 - logits.exp()) / 20_000).sqrt()).all()
