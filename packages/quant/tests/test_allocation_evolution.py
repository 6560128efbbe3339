"""Axis allocation, EvoPress: its search on problems whose optimum is known."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from tersor.quant.allocation import Evolution

# three sizes of layers, eight of each
SIZES = (1, 2, 3) * 8
COSTS = [tuple(size * bits for bits in (2, 3, 4, 5)) for size in SIZES]
UNIFORM = sum(3 * size for size in SIZES)
SMALL = Evolution(generations=30, offspring=24, survivors=(6, 2, 1), tokens=(1, 1, 1))
every_move = pytest.mark.parametrize("moves", ["swap", "any"])


def cost(state) -> int:
    return sum(of_layer[level] for of_layer, level in zip(COSTS, state))


def planted(rng: random.Random) -> tuple[int, ...]:
    """A state that swaps within each size reach from level 1 everywhere."""
    levels = [1] * len(SIZES)
    for _ in range(40):
        size = rng.choice((1, 2, 3))
        down, up = rng.sample([layer for layer, of_layer in enumerate(SIZES) if of_layer == size], 2)
        if levels[down] > 0 and levels[up] < 3:
            levels[down] -= 1
            levels[up] += 1
    return tuple(levels)


def distance_to(target):
    """Separable: each layer by itself is best at its own level."""
    weights = [1 + layer % 5 for layer in range(len(target))]
    return lambda states, _: [sum(w * (a - b) ** 2 for w, a, b in zip(weights, state, target)) for state in states]


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_optimum_of_24_layers_is_found_within_100_generations(seed):
    target = planted(random.Random(seed))
    assert cost(target) == UNIFORM
    assert target != (1,) * len(SIZES)
    search = Evolution(generations=100, tokens=(1, 1, 1), seed=seed).search(COSTS, UNIFORM, distance_to(target))
    assert target in itertools.islice(search, 101)


def test_a_state_that_overflows_is_never_a_parent():
    """NaN compares as neither more nor less."""
    target = planted(random.Random(0))
    finite = distance_to(target)

    def fitness(states, tokens):
        return [math.nan if 3 in state else value for state, value in zip(states, finite(states, tokens))]

    *_, last = SMALL.search(COSTS, UNIFORM, fitness)
    assert 3 not in last
    assert last != (1,) * len(SIZES)


@pytest.mark.parametrize("budget", [UNIFORM, UNIFORM + 7])
def test_swaps_spend_the_same_in_every_generation(budget):
    parents = list(SMALL.search(COSTS, budget, distance_to(planted(random.Random(0)))))
    assert len(parents) == 31
    assert {cost(parent) for parent in parents} == {budget}
    assert len(set(parents)) > 5


def test_moves_of_any_kind_take_from_layers_of_one_size_for_those_of_another():
    """As swaps cannot: the best has level 3 in layers of size 1, and 0 in those of size 2 for it."""
    fitness = distance_to(tuple((3, 0, 1)[size - 1] for size in SIZES))
    for moves in ("swap", "any"):
        parents = list(replace(SMALL, moves=moves).search(COSTS, UNIFORM, fitness))
        assert max(map(cost, parents)) <= UNIFORM
        first, last = fitness([parents[0], parents[-1]], 1)
        assert (last < first / 2) == (moves == "any")


@every_move
def test_the_parent_never_gets_worse_on_the_whole_text(moves):
    """All stages see the same: of the parent and its offspring the best goes on."""
    fitness = distance_to(planted(random.Random(1)))
    values = fitness(list(replace(SMALL, moves=moves).search(COSTS, UNIFORM, fitness)), 1)
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_each_stage_sees_the_text_that_it_is_given_and_fewer_states():
    seen = []

    def fitness(states, tokens):
        seen.append((len(states), tokens))
        assert len(set(states)) == len(states)
        return [0.0] * len(states)

    list(Evolution(generations=2, tokens=(7, 8, 9)).search(COSTS, UNIFORM, fitness))
    # the parent joins the last stage
    assert seen == [(128, 7), (16, 8), (5, 9)] * 2


def test_one_seed_gives_one_search():
    fitness = distance_to(planted(random.Random(2)))
    first, again = (list(SMALL.search(COSTS, UNIFORM + 1, fitness)) for _ in range(2))
    other = list(replace(SMALL, seed=1).search(COSTS, UNIFORM + 1, fitness))
    assert first == again
    assert first != other


def test_the_best_of_some_random_starts_is_taken():
    """A budget between two levels: what is left is spread at random, to the last."""
    target = tuple(1 + (layer % 2) for layer in range(24))
    fitness = distance_to(target)
    starts = {
        initial: next(replace(SMALL, initial=initial).search(COSTS, UNIFORM + 18, fitness)) for initial in (1, 16)
    }
    assert all(cost(start) == UNIFORM + 18 for start in starts.values())
    assert all(Counter(start).keys() <= {1, 2, 3} for start in starts.values())
    assert fitness([starts[16]], 1) < fitness([starts[1]], 1)


def test_search_ends_where_nothing_can_move():
    everything = sum(max(of_layer) for of_layer in COSTS)
    assert list(SMALL.search(COSTS, everything, distance_to((0,) * 24))) == [(3,) * 24]


def test_layers_that_all_cost_different_amounts_cannot_be_swapped():
    with pytest.raises(ValueError, match='use moves="any"'):
        next(SMALL.search(COSTS[:3], UNIFORM, distance_to((0,) * 3)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"survivors": (4, 1)}, "different numbers of stages"),
        ({"survivors": (4, 2, 2)}, "down to 1"),
        ({"survivors": (4, 8, 1)}, "fewer"),
        ({"survivors": (), "tokens": ()}, "down to 1"),
        ({"offspring": 8}, "offspring must be at least 16"),
        ({"initial": 0}, "initial"),
        ({"moves": "jump"}, "'jump'"),
    ],
)
def test_settings_that_make_no_search_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Evolution(**settings)
