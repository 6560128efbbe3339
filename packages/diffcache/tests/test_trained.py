"""FORA on the zoo's diffusion transformer, 50 steps, ten classes."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from tersor.diffcache import cached, recipes

STEPS = 50


@pytest.fixture(scope="module")
def tiny_dit(zoo):
    if "tiny-dit" not in zoo.names():
        pytest.skip("tiny-dit is not in the zoo")
    return zoo.load_model("tiny-dit")


@pytest.fixture(scope="module", params=[None, 2.0], ids=["alone", "guided"])
def sample(request, tiny_dit):
    """Samples of every class, always from the same noise; the function's argument is a recipe."""
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    euler = sys.modules[type(tiny_dit).__module__].euler

    def run(recipe=None):
        if recipe is None:
            return euler(tiny_dit, noise, torch.arange(10), STEPS, request.param)
        with cached(tiny_dit, recipe) as session:
            images = euler(tiny_dit, noise, torch.arange(10), STEPS, request.param)
        branches = 1 if request.param is None else 2
        # of each block, attention and MLP
        assert session.stats.executed == math.ceil(STEPS / recipe.trigger.n) * branches * 2 * len(tiny_dit.blocks)
        return images

    return run


@pytest.fixture(scope="module")
def full(sample):
    with torch.no_grad():
        return sample()


def psnr(images, reference) -> float:
    """In dB; pictures are from -1 to 1."""
    return 10 * math.log10(4 / (images - reference).square().mean().item())


def test_pictures_move_away_as_the_interval_grows(sample, full):
    found = [psnr(sample(recipes.fora(n)), full) for n in (2, 4, 8)]
    assert all(nearer > further + 1 for nearer, further in pairwise(found))
    assert found[0] > 30
