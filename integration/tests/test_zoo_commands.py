"""`tersor zoo`: list, show, train, evaluate."""

import json
from types import SimpleNamespace

import pytest

from tersor.integration import zoo
from tersor.integration.zoo import families
from tersor.integration.zoo.measure import Figure


def test_list_names_every_model_with_its_size_and_training(tersor):
    found = json.loads(tersor("zoo", "list", "--json").stdout)
    assert [model["name"] for model in found] == zoo.names()
    for model in found:
        assert 1e6 < model["nbytes"] <= 20e6
        assert model["training"]["steps"] > 0
        assert model["training"]["minutes"] > 0
    assert sum(model["nbytes"] for model in found) <= 80e6


def test_every_model_has_a_family_that_trains_and_measures_it():
    for name in zoo.names():
        assert name in families.training(name).TRAININGS


def test_show_prints_the_card(tersor):
    result = tersor("zoo", "show", "tiny-cnn")
    assert result.returncode == 0
    assert "Fashion-MNIST" in result.stdout
    assert str(zoo.path("tiny-cnn")) in result.stderr


@pytest.mark.parametrize("command", ["show", "train", "evaluate"])
def test_unknown_models_are_one_line(tersor, command):
    result = tersor("zoo", command, "tiny-lmm")
    assert result.returncode == 2
    assert "no model 'tiny-lmm' in the zoo" in result.stderr
    assert "tiny-lm" in result.stderr
    assert "Traceback" not in result.stderr


def test_evaluate_shows_what_was_reached_and_wanted(tersor, monkeypatch):
    figure = Figure("accuracy", 0.915, 0.6775, "nearest class mean", bar=0.91)
    monkeypatch.setattr(families, "figures", lambda name: [figure])
    table = tersor("zoo", "evaluate", "tiny-cnn", "--markdown").stdout.splitlines()
    assert len(table) == 3
    assert [cell.strip() for cell in table[2].split("|")[4:8]] == [
        "accuracy",
        "91.50 %",
        "91.00 %",
        "67.75 % (nearest class mean)",
    ]
    (row,) = json.loads(tersor("zoo", "evaluate", "tiny-cnn", "--json").stdout)
    assert row["figures"] == [
        {
            "metric": "accuracy",
            "value": 0.915,
            "baseline": 0.6775,
            "baseline_name": "nearest class mean",
            "bar": 0.91,
            "is_share": True,
        }
    ]


def test_train_says_where_the_model_is(tersor, monkeypatch, tmp_path):
    seen = []

    def train(training, folder, progress, seed):
        seen.append((training, folder, seed))
        for step in (1, 2):
            progress(step, 2, "loss 1.000")

    module = SimpleNamespace(TRAININGS={"tiny-cnn": "a training"}, train=train)
    monkeypatch.setattr(families, "training", lambda name: module)
    result = tersor("zoo", "train", "tiny-cnn", "--out", str(tmp_path / "run"), "--seed", "3")
    assert result.returncode == 0
    assert seen == [("a training", tmp_path / "run", 3)]
    assert result.stderr.splitlines() == [
        "tersor: 2 of 2: loss 1.000",
        f"tersor: model and card: {tmp_path / 'run/model'}",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_table_is_what_evaluate_prints(tersor):
    """Ten minutes at most; figures within half a point or one per cent: another processor rounds otherwise."""
    readme = (zoo.path("tiny-lm").parent / "README.md").read_text().splitlines()
    printed = tersor("zoo", "evaluate", "--markdown").stdout.splitlines()
    for line in printed[2:]:
        name, metric, reached = (line.split("|")[i].strip() for i in (1, 4, 5))
        stated = next(row for row in readme if row.startswith(f"| {name} |") and f"| {metric} |" in row)
        value, expected = (float(text.split()[0]) for text in (reached, stated.split("|")[5]))
        tolerance = 0.5 if reached.endswith("%") else 0.01 * expected
        assert value == pytest.approx(expected, abs=tolerance), f"{name}: {metric}"
