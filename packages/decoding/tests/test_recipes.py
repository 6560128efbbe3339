import dataclasses
import inspect
import re

import pytest
import torch

from tersor.decoding import Recipe, recipes, speculate
from tersor.decoding.controller import Heuristic
from tersor.decoding.drafter import NgramDrafter
from tersor.decoding.verifier import Greedy

named = [getattr(recipes, name) for name in recipes.__all__]


@pytest.mark.parametrize("recipe", named, ids=lambda r: r.__name__)
def test_a_recipe_is_a_plain_frozen_value(recipe):
    assert recipe() == recipe()
    assert hash(recipe()) == hash(recipe())
    assert isinstance(recipe(), Recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().drafter = None


@pytest.mark.parametrize("recipe", named, ids=lambda r: r.__name__)
def test_a_recipe_names_its_source(recipe):
    assert re.match(r"[^(]+ \((arXiv:\d{4}\.\d{5}|https://\S+)\): .+\.$", inspect.getdoc(recipe).splitlines()[0])


def test_only_recipes_are_public():
    assert {n for n, v in vars(recipes).items() if callable(v) and not n.startswith("_")} == set(recipes.__all__)


@pytest.mark.parametrize(
    "recipe",
    [
        *(r() for r in named),
        Recipe(NgramDrafter(1, "first")),
        Recipe(NgramDrafter(2), Greedy()),
        Recipe(NgramDrafter(), None, Heuristic()),
    ],
    ids=str,
)
def test_every_recipe_gives_the_tokens_of_generate(recipe, random_model, llama):
    prompt = torch.randint(0, 12, (1, 11), generator=torch.Generator().manual_seed(5))
    expected = random_model.generate(prompt, do_sample=False, max_new_tokens=40)
    needs_model = recipe.drafter is not None and recipe.drafter.needs_draft_model
    draft_model = llama if needs_model else None
    out = speculate(random_model, prompt, recipe, draft_model=draft_model, do_sample=False, max_new_tokens=40)
    assert torch.equal(out.sequences, expected)
    assert out.stats.tokens == 40
