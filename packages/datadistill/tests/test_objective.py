from itertools import pairwise

import pytest
import torch

from tersor.datadistill.objective import Herding, RandomChoice

OBJECTIVES = [RandomChoice(), Herding(), Herding(normalise=True)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_shorter_choice_is_the_beginning_of_a_longer_one(objective):
    images = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
    longer = objective.choose(images, 9, torch.Generator().manual_seed(1))
    shorter = objective.choose(images, 4, torch.Generator().manual_seed(1))
    assert torch.equal(longer[:4], shorter)
    assert longer.unique().numel() == 9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalise", [False, True])
def test_herding_equals_the_search_over_all_next_examples(seed, normalise):
    images = torch.randn(11, 4, generator=torch.Generator().manual_seed(seed)).double()
    z = images / images.norm(dim=1, keepdim=True) if normalise else images
    chosen = []
    for _ in range(7):
        rest = [i for i in range(11) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((z.mean(0) - z[[*chosen, i]].mean(0)).norm())))
    assert Herding(normalise).choose(images, 7, torch.Generator()).tolist() == chosen


def test_herding_of_unit_features_is_the_published_inner_product_rule():
    z = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double())
    w, chosen = z.mean(0), []
    for _ in range(10):
        scores = z @ w
        scores[chosen] = -torch.inf
        chosen.append(int(scores.argmax()))
        w = w + z.mean(0) - z[chosen[-1]]
    assert Herding(normalise=True).choose(z, 10, torch.Generator()).tolist() == chosen


def test_herding_breaks_ties_in_favour_of_the_earlier():
    assert Herding().choose(torch.ones(6, 3), 3, torch.Generator()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 2, 5, 10, 30])
def test_herded_means_are_closer_than_random_ones(digits, k):
    images, labels = digits[0].tensors
    for c in (0, 4, 8):
        z = images[labels == c].flatten(1).double()

        def error(choice, z=z):
            return float((z[choice].mean(0) - z.mean(0)).norm())

        herded = error(Herding().choose(z, k, torch.Generator()))
        lots = [error(RandomChoice().choose(z, k, torch.Generator().manual_seed(seed))) for seed in range(8)]
        assert herded < min(lots)
        assert herded < 0.8 * sum(lots) / len(lots)


def test_herding_errors_fall_faster_than_random_ones(digits):
    """Random means have an error of k^-1/2; greedy ones fall nearly as 1 / k."""
    images, labels = digits[0].tensors
    z = images[labels == 3].flatten(1).double()
    order = Herding().choose(z, 64, torch.Generator())
    errors = [float((z[order[:k]].mean(0) - z.mean(0)).norm()) for k in (1, 4, 16, 64)]
    assert all(b < a / 2 for a, b in pairwise(errors))
