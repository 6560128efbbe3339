import pytest

from tersor.integration.errors import UserError
from tersor.integration.plan import Plan, names


@pytest.mark.parametrize("name", names())
def test_shipped_plans_load(name):
    plan = Plan.load(name)
    assert plan.name == name
    assert set(plan.recipes) == set(plan.settings)


def test_default_plan_is_what_the_readme_says():
    settings = Plan.load("default").settings
    assert settings["quant"] == {"recipe": "gptq", "bits": 4, "group_size": 64}
    assert settings["kvcache"] == {"recipe": "kivi", "bits": 4}
    assert set(settings) == {"quant", "kvcache", "decoding", "lossless"}


def test_a_plan_file_is_read(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[quant]\nrecipe = "rtn"\nbits = 3\n')
    plan = Plan.load(file)
    assert plan.name == "mine"
    assert plan.recipes["quant"].grid.bits == 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"qaunt": {"recipe": "rtn"}}, 'did you mean "quant"'),
        ({"tokencomp": {"recipe": "tome"}}, "does not apply to a causal language model"),
        ({"quant": {"bits": 4}}, 'needs recipe = "NAME"'),
        ({"quant": {"recipe": "gptg"}}, 'did you mean "gptq"'),
        ({"quant": {"recipe": "rtn", "bit": 4}}, 'did you mean "bits"'),
        ({"quant": {"recipe": "rtn", "bits": "four"}}, "bits must be int, got 'four'"),
        ({"quant": {"recipe": "rtn", "bits": True}}, "bits must be int, got True"),
        ({"quant": {"recipe": "rtn", "bits": 99}}, "99"),
        ({"quant": "rtn"}, 'needs recipe = "NAME"'),
    ],
)
def test_mistakes_are_named_with_the_way_out(table, message):
    with pytest.raises(UserError) as error:
        Plan.load(table)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_plan_offers_the_near_one():
    with pytest.raises(UserError, match='did you mean "default"'):
        Plan.load("defualt")
    with pytest.raises(UserError, match="does not exist"):
        Plan.load("nowhere/plan.toml")


def test_broken_toml_names_the_file(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[quant\n")
    with pytest.raises(UserError, match=r"broken.toml: not TOML"):
        Plan.load(file)
