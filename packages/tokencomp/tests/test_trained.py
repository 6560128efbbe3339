"""What a claim about accuracy needs: a trained model (see digits_vit/train.py)."""

import pytest
import torch
from digits_vit.train import held_out, trained_model

from tersor.tokencomp import Recipe, recipes, slim
from tersor.tokencomp.reducer import Merge
from tersor.tokencomp.schedule import PerLayer
from tersor.tokencomp.scorer import RandomScorer

SEEDS = range(4)
# with r = 8 the last layer has 13 tokens left, of which 6 can go
pytestmark = pytest.mark.filterwarnings("ignore:.*6 can go")


@pytest.fixture(scope="module")
def accuracy():
    model, (images, labels) = trained_model(), held_out()

    @torch.no_grad()
    def measure(recipe=None):
        if recipe is None:
            return (model(images).argmax(-1) == labels).float().mean().item()
        with slim(model, recipe):
            return (model(images).argmax(-1) == labels).float().mean().item()

    return measure


def test_a_third_fewer_tokens_cost_tome_at_most_one_point(accuracy):
    # 37 tokens enter, 21 leave: 29 on average over the layers' MLPs
    assert accuracy(recipes.tome(r=4)) >= accuracy() - 0.01


@pytest.mark.parametrize("r", [4, 8])
def test_tome_is_better_than_a_lot_at_equal_r(accuracy, r):
    tome = accuracy(recipes.tome(r=r))
    prune = sum(accuracy(recipes.random_pruning(r=r, seed=seed)) for seed in SEEDS) / len(SEEDS)
    merge = sum(accuracy(Recipe(RandomScorer(8, seed), Merge(), PerLayer(r))) for seed in SEEDS) / len(SEEDS)
    # 0.03: more than twice the standard error of 500 images; measured are 0.08 to 0.23
    assert tome > prune + 0.03
    assert tome > merge + 0.03


def test_training_through_merged_tokens_lowers_the_loss():
    model, (images, labels) = trained_model(), held_out()
    images, labels = images[:128], labels[:128]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    with slim(model, recipes.tome(r=8)):
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
