import pytest

from tersor.tokencomp.schedule import PerLayer


def test_constant_schedule():
    assert PerLayer(8).plan(4, 197) == (8, 8, 8, 8)


def test_inflected_schedules_are_linear_and_end_where_the_paper_says():
    assert PerLayer(6, -1.0).plan(5, 197) == (12, 9, 6, 3, 0)
    assert PerLayer(6, 1.0).plan(5, 197) == (0, 3, 6, 9, 12)
    assert PerLayer(8, 0.5).plan(3, 197) == (4, 8, 12)


@pytest.mark.parametrize("layers", [1, 2, 7, 12, 24])
@pytest.mark.parametrize("inflect", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_inflection_keeps_the_total_up_to_rounding(layers, inflect):
    plan = PerLayer(13, inflect).plan(layers, 197)
    assert len(plan) == layers
    assert min(plan) >= 0
    if layers > 1:
        assert 13 * layers - layers < sum(plan) <= 13 * layers


def test_a_list_is_taken_as_it_is():
    assert PerLayer((4, 0, 9)).plan(3, 197) == (4, 0, 9)
    with pytest.raises(ValueError, match="r has 3 numbers for 4 layers"):
        PerLayer((4, 0, 9)).plan(4, 197)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="r must not be negative, got -1"):
        PerLayer(-1)
    with pytest.raises(ValueError, match="inflect must be -1 to 1, got 2"):
        PerLayer(8, 2)
    with pytest.raises(ValueError, match="leave out inflect"):
        PerLayer((8, 8), 0.5)
