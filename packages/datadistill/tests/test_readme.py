import re
from pathlib import Path

from tersor.datadistill.distill import DistilledSet

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_example_runs_and_is_judged_on_images_that_it_was_not_trained_on(monkeypatch):
    judged = []
    monkeypatch.setattr(DistilledSet, "evaluate", lambda small, test: judged.append(test))  # a minute of training
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    (test,) = judged
    train = names["train"].tensors[0]
    assert not any((image == train).flatten(1).all(1).any() for image, _ in test)
