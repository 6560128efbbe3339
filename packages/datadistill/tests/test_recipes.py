import re
from dataclasses import FrozenInstanceError

import pytest

from tersor.datadistill import Recipe, recipes

ALL = [getattr(recipes, name) for name in recipes.__all__]


def test_all_public_names_are_recipes():
    public = {name for name, value in vars(recipes).items() if callable(value) and not name.startswith("_")}
    assert public == set(recipes.__all__)


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.__name__)
def test_a_recipe_is_a_frozen_value_with_a_source(recipe):
    assert isinstance(recipe(), Recipe)
    assert recipe() == recipe()
    assert hash(recipe()) == hash(recipe())
    with pytest.raises(FrozenInstanceError):
        recipe().objective = None
    assert re.match(r"[^(]+ \((arXiv:\d{4}\.\d{4,5}|https://\S+)\): .+\.$", recipe.__doc__.splitlines()[0])
