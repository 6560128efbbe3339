import pytest

from tersor.decoding import controller as axis
from tersor.decoding.controller import FixedLength, Heuristic


@pytest.mark.parametrize("controller", [getattr(axis, name)() for name in axis.__all__], ids=str)
def test_every_controller_asks_for_at_least_one_token(controller):
    length = controller.first()
    for proposed, accepted in [(1, 0)] * 20 + [(3, 3)] * 3 + [(9, 2)] * 30:
        assert length >= 1
        length = controller.next(length, proposed, accepted)


def test_heuristic_grows_by_two_and_shrinks_by_one():
    heuristic = Heuristic(num_draft=5)
    assert (heuristic.next(5, 5, 5), heuristic.next(5, 5, 4), heuristic.next(1, 1, 0)) == (7, 4, 1)


@pytest.mark.parametrize("controller", [FixedLength, Heuristic])
def test_num_draft_is_checked(controller):
    with pytest.raises(ValueError, match=r"num_draft must be at least 1, got 0; recipes.greedy\(\)"):
        controller(num_draft=0)
