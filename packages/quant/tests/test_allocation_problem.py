"""Axis allocation, the solvers: against trying every choice."""

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.quant.allocation import DynamicProgram, Greedy, IntegerProgram, Problem

EXACT = [DynamicProgram(), IntegerProgram()]
every_solver = pytest.mark.parametrize("solver", [Greedy(), *EXACT], ids=lambda solver: type(solver).__name__)
every_exact = pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
a_few = settings(max_examples=40, deadline=None, derandomize=True)


def brute_force(problem: Problem) -> float:
    """The least sum of losses of all choices within the budget."""
    choices = itertools.product(*(range(len(costs)) for costs in problem.costs))
    return min(problem.loss(choice) for choice in choices if problem.cost(choice) <= problem.budget)


@st.composite
def problems(draw, costs=st.integers(0, 12).map(lambda c: 6 * c), max_layers: int = 5) -> Problem:
    """Any costs and losses, in any order, and a budget between the least and the most that can be spent."""
    layers = draw(
        st.lists(
            st.lists(st.tuples(costs, st.floats(0, 1, width=16)), min_size=1, max_size=4),
            min_size=1,
            max_size=max_layers,
        )
    )
    of_layers = tuple(tuple(cost for cost, _ in options) for options in layers)
    least, most = sum(map(min, of_layers)), sum(map(max, of_layers))
    # rounded, it may be less than the least
    budget = max(least, least + draw(st.floats(0, 1.2)) * (most - least))
    return Problem(of_layers, tuple(tuple(loss for _, loss in options) for options in layers), budget)


@every_exact
@a_few
@given(problem=problems())
def test_the_exact_solvers_equal_trying_every_choice(solver, problem):
    choice = solver.choose(problem)
    assert problem.cost(choice) <= problem.budget
    # 1e-9: the integer program stops that close to the optimum
    assert problem.loss(choice) == pytest.approx(brute_force(problem), abs=1e-9)


@a_few
@given(problem=problems(costs=st.integers(0, 10**6).map(lambda c: c / 7)))
def test_the_integer_program_takes_costs_that_are_no_whole_numbers(problem):
    choice = IntegerProgram().choose(problem)
    assert problem.cost(choice) <= problem.budget
    assert problem.loss(choice) == pytest.approx(brute_force(problem), abs=1e-9)


@a_few
@given(losses=st.lists(st.tuples(*[st.floats(1e-7, 1e-5)] * 3), min_size=7, max_size=7), share=st.floats(0, 1))
def test_small_differences_of_losses_decide_on_seven_layers(losses, share):
    """CalibTIP's program: a layer of n weights at 2, 4 or 8 bits, and what each of them loses."""
    weights = (64, 128, 128, 256, 256, 512, 512)
    costs = tuple(tuple(bits * n for bits in (2, 4, 8)) for n in weights)
    problem = Problem(costs, tuple(losses), sum(n * (2 + 6 * share) for n in weights))
    best = brute_force(problem)
    for solver in EXACT:
        choice = solver.choose(problem)
        assert problem.cost(choice) <= problem.budget
        assert problem.loss(choice) == pytest.approx(best, rel=1e-6)


@a_few
@given(problem=problems())
def test_greedy_loses_at_most_one_step_more_than_the_best(problem):
    choice = Greedy().choose(problem)
    assert problem.cost(choice) <= problem.budget
    step = max(max(losses) - min(losses) for losses in problem.losses)
    assert brute_force(problem) <= problem.loss(choice) + 1e-12
    assert problem.loss(choice) <= brute_force(problem) + step + 1e-12


@a_few
@given(
    gains=st.lists(st.lists(st.integers(1, 100), min_size=3, max_size=3), min_size=1, max_size=5),
    steps=st.integers(0, 15),
)
def test_greedy_is_the_best_where_each_bit_gains_less_than_the_one_before(gains, steps):
    """Layers of one size, convex losses: no step is ever turned down but for want of any budget."""
    losses = tuple(tuple(float(sum(sorted(of_layer, reverse=True)[bits:])) for bits in range(4)) for of_layer in gains)
    problem = Problem(((0, 8, 16, 24),) * len(losses), losses, 8 * steps)
    assert problem.loss(Greedy().choose(problem)) == brute_force(problem)


@every_solver
def test_a_budget_for_everything_buys_the_least_losses(solver):
    problem = Problem(((2, 3, 4), (4, 6, 8)), ((3.0, 1.0, 2.0), (0.5, 0.25, 0.125)), 12)
    assert solver.choose(problem) == (1, 2)


@every_solver
def test_the_least_budget_buys_the_cheapest_options(solver):
    problem = Problem(((4, 3, 2, 2), (8, 4, 6)), ((0.0, 1.0, 3.0, 2.0), (0.0, 9.0, 1.0)), 6)
    assert solver.choose(problem) == (3, 1)


def test_too_small_a_budget_names_the_least_cost():
    with pytest.raises(ValueError, match="budget = 5 is less than the least possible cost, 6"):
        Problem(((2, 3), (4, 8)), ((1.0, 0.0), (1.0, 0.0)), 5)


@pytest.mark.parametrize(
    ("costs", "losses", "said"),
    [
        (((1,),), (), "costs are of 1 layers, losses of 0"),
        (((1, 2),), ((0.5,),), "layer 0 has 2 costs and 1 losses"),
        (((),), ((),), "layer 0 has 0 costs"),
        (((1,), (1,)), ((0.0,), (float("nan"),)), "layer 1: .* must be finite"),
    ],
)
def test_what_does_not_fit_together_is_named(costs, losses, said):
    with pytest.raises(ValueError, match=said):
        Problem(costs, losses, 100)


def test_fractions_and_tables_beyond_memory_are_for_the_integer_program():
    with pytest.raises(ValueError, match=r"whole numbers, got 1.5; use IntegerProgram"):
        DynamicProgram().choose(Problem(((1.5, 2.0),), ((1.0, 0.0),), 2))
    primes = Problem(((0, 10**9 + 7), (0, 10**9 + 9)) * 5, ((1.0, 0.0),) * 10, 5 * 10**9)
    with pytest.raises(ValueError, match="use IntegerProgram"):
        DynamicProgram().choose(primes)
    assert sum(IntegerProgram().choose(primes)) == 4


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"tersor-quant\[allocation\]"):
        IntegerProgram().choose(Problem(((1,),), ((0.0,),), 1))
