"""What holds for every recipe, found by its name alone."""

import inspect
import re

import pytest
import torch

from tersor.kvcache import CompressedCache, Recipe, recipes

NAMES = recipes.__all__


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_its_source_and_needs_no_argument(name):
    function = getattr(recipes, name)
    first_line = inspect.getdoc(function).splitlines()[0]
    assert re.fullmatch(r"\S.* \((arXiv:\d{4}\.\d{5}|https://\S+)\): .*\.", first_line)
    recipe = function()
    assert isinstance(recipe, Recipe)
    assert recipe == function()
    assert hash(recipe) == hash(function())
    assert eval(repr(recipe), _pieces()) == recipe


def test_all_lists_every_public_function():
    public = [name for name, thing in vars(recipes).items() if callable(thing) and not name.startswith("_")]
    assert sorted(public) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_generates_and_never_holds_more_than_it_says(name, llama):
    cache = CompressedCache(llama.config, getattr(recipes, name)())
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(0))
    output = llama.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert output.shape == (2, 305)
    assert 0 < cache.nbytes <= cache.stats.dense_nbytes


def _pieces():
    from tersor.kvcache import codec, window

    return {name: getattr(axis, name) for axis in (codec, window) for name in axis.__all__} | {"Recipe": Recipe}
