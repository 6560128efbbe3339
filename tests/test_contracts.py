"""What every recipe of every installed package keeps to."""

import dataclasses
import importlib

import pytest

from tersor.integration import catalogue

METHODS = [(package, name) for package in catalogue.packages() for name in catalogue.recipes(package)]


def test_every_package_of_the_house_is_listed():
    assert catalogue.packages() == ["quant", "kvcache", "decoding", "diffcache", "tokencomp", "datadistill", "lossless"]


@pytest.mark.parametrize("package", catalogue.packages())
def test_a_package_shows_its_verb_recipe_and_recipes_and_little_else(package):
    module = importlib.import_module(f"tersor.{package}")
    assert {"Recipe", "recipes"} <= set(module.__all__)
    verbs = [name for name in module.__all__ if name not in ("Recipe", "recipes")]
    assert 1 <= len(verbs) <= 3
    assert all(callable(getattr(module, verb)) for verb in verbs)


@pytest.mark.parametrize(("package", "name"), METHODS)
def test_a_recipe_is_a_frozen_hashable_value(package, name):
    function = catalogue.recipe(package, name)
    recipe, again = function(), function()
    assert isinstance(recipe, importlib.import_module(f"tersor.{package}").Recipe)
    assert recipe == again
    assert hash(recipe) == hash(again)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(recipe, dataclasses.fields(recipe)[0].name, None)


@pytest.mark.parametrize("package", catalogue.packages())
def test_the_catalogue_reads_every_recipe(package):
    methods = catalogue.methods(package)
    assert methods
    for method in methods:
        assert method.summary
        assert method.pieces
