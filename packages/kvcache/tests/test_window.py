import pytest

from tersor.kvcache import window as windows
from tersor.kvcache.window import FlushedWindow, RecentWindow


def all_windows():
    return [getattr(windows, name)(length) for name in windows.__all__ for length in (1, 7, 32)]


@pytest.mark.parametrize("window", all_windows(), ids=str)
def test_encoded_tokens_never_come_back(window):
    counts = [window.encoded(n) for n in range(-3, 200)]
    assert counts == sorted(counts)
    assert all(0 <= count <= max(0, n) for n, count in zip(range(-3, 200), counts))


def test_recent_window_always_keeps_its_length():
    assert [n - RecentWindow(8).encoded(n) for n in (0, 5, 8, 9, 100)] == [0, 5, 8, 8, 8]


def test_flushed_window_keeps_the_remainder():
    assert [n - FlushedWindow(8).encoded(n) for n in (0, 5, 8, 9, 100)] == [0, 5, 0, 1, 4]


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="residual_length must be 0 or more tokens, got -1"):
        RecentWindow(-1)
    with pytest.raises(ValueError, match="residual_length must be 1 token or more, got 0"):
        FlushedWindow(0)
