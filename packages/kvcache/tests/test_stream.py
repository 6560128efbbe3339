"""What is stored depends on the tokens that are left, not on the way that led there."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kvcache.codec import FullPrecision, PerChannel, PerToken
from tersor.kvcache.recipe import Codec, Window
from tersor.kvcache.stream import Stream
from tersor.kvcache.window import FlushedWindow, RecentWindow


@dataclass(frozen=True)
class Setting:
    codec: Codec
    window: Window
    undo: int = 5


SETTINGS = [
    Setting(PerChannel(2, 8), FlushedWindow(16)),
    Setting(PerChannel(3, 4), RecentWindow(12)),
    Setting(PerChannel(4, 8), RecentWindow(0), undo=0),
    Setting(PerToken(2, 4), RecentWindow(10)),
    Setting(PerToken(4, 8), FlushedWindow(6), undo=20),
    Setting(FullPrecision(), RecentWindow(0)),
    Setting(FullPrecision(), FlushedWindow(8)),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def new_stream(setting):
    stream = Stream(setting.codec, setting.window, setting.undo)
    stream.recent = torch.empty(1, 2, 0, 8)
    return stream


def random_tokens(num_tokens, seed):
    return torch.randn(1, 2, num_tokens, 8, generator=torch.Generator().manual_seed(seed))


def assert_same(a, b):
    """The same in all that decides about what is to come: tokens and their bytes, except copies kept for an undo."""
    assert a.length == b.length
    assert torch.equal(a.dense(), b.dense())
    if not a.codec.lossless:  # where the container makes no difference
        assert a.encoded == b.encoded
        assert len(a.runs) == len(b.runs)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors()[:-1], b.tensors()[:-1]))


def replay(setting, x, steps):
    """A stream that got tokens `x` in the given steps, and nothing else."""
    stream = new_stream(setting)
    for part in x.split(steps, 2):
        stream.append(part, recording=False)
    return stream


@each_setting
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_what_is_stored_does_not_depend_on_the_steps(setting, cuts):
    x = random_tokens(sum(cuts), 0)
    assert_same(replay(setting, x, cuts), replay(setting, x, sum(cuts)))


# a program: append that many tokens, then take back that share of what may be taken back
programs = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=12)


@each_setting
@given(program=programs)
@settings(max_examples=25, deadline=None)
def test_tokens_taken_back_have_never_been_there(setting, program):
    stream, left, longest = new_stream(setting), random_tokens(0, 0), 0
    for seed, (num_tokens, share) in enumerate(program):
        x = random_tokens(num_tokens, seed)
        stream.append(x, recording=False)
        left = torch.cat([left, x], 2)
        longest = max(longest, stream.length)
        # the last `undo` that ever came; what was taken back before counts
        num_undone = round(share * max(0, min(stream.length, setting.undo - (longest - stream.length))))
        stream.crop(num_undone)
        left = left[:, :, : left.shape[2] - num_undone]
    assert_same(stream, replay(setting, left, left.shape[2]) if left.shape[2] else new_stream(setting))


@each_setting
@given(program=programs, prompt=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_while_recording_any_number_of_tokens_can_be_taken_back(setting, program, prompt):
    stream, left = new_stream(setting), random_tokens(prompt, 99)
    stream.append(left, recording=False)
    for seed, (num_tokens, share) in enumerate(program):
        x = random_tokens(num_tokens, seed)
        for part in x.split(7, 2):
            stream.append(part, recording=True)
        num_undone = round(share * num_tokens)
        stream.crop(num_undone)
        left = torch.cat([left, x[:, :, : num_tokens - num_undone]], 2)
    assert_same(stream, replay(setting, left, left.shape[2]))


@each_setting
@given(program=programs)
@settings(max_examples=25, deadline=None)
def test_after_a_deeper_crop_the_codes_that_are_left_decode_as_before(setting, program):
    stream, left = new_stream(setting), random_tokens(0, 0)
    for seed, (num_tokens, share) in enumerate(program):
        x = random_tokens(num_tokens, seed)
        seen = stream.append(x, recording=False).dense()
        assert torch.equal(seen[:, :, seen.shape[2] - num_tokens :], x)
        left = torch.cat([left, x], 2)
        before, length = stream.dense(), stream.length - round(share * stream.length)
        encoded = stream.encoded
        stream.crop(stream.length - length)
        left = left[:, :, :length]
        assert stream.length == length
        # each token is what it was, or exact again where its full precision was still at hand
        as_before = (stream.dense() == before[:, :, :length]).all(-1).all(1)
        exact = (stream.dense() == left).all(-1).all(1)
        assert (as_before | exact).all()
        assert exact[:, min(encoded, length) :].all()


@each_setting
def test_a_deep_crop_leaves_a_working_stream(setting):
    stream = replay(setting, random_tokens(100, 0), 100)
    stream.crop(63)
    kept = stream.dense()
    x = random_tokens(200, 1)
    for part in x.split(3, 2):
        stream.append(part, recording=False)
    assert torch.equal(stream.dense()[:, :, :25], kept[:, :, :25])
    assert len(stream.runs) <= 2
    assert stream.length - stream.encoded < setting.window.residual_length + setting.codec.token_group
    stream.crop(4)
    stream.append(x[:, :, -4:], recording=False)
    assert stream.length == 237


@each_setting
def test_everything_can_be_taken_back(setting):
    stream = replay(setting, random_tokens(70, 0), 70)
    stream.crop(1000)
    assert stream.length == stream.encoded == sum(t.nbytes for t in stream.tensors()) == 0
    x = random_tokens(33, 2)
    stream.append(x, recording=False)
    assert_same(stream, replay(setting, x, 33))


@each_setting
def test_codes_never_change(setting):
    """Encoded once: the bytes of a token stay what they are while others come."""
    stream, x, packed = new_stream(setting), random_tokens(150, 0), None
    for part in x.split([40] + 110 * [1], 2):
        stream.append(part, recording=False)
        if not stream.runs:
            continue
        (run,) = stream.runs
        if packed is not None:
            assert torch.equal(run[0][:, :, : packed.shape[2]], packed)
        packed = run[0].clone()
    assert packed is not None


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.window.residual_length and s.undo and s.codec != FullPrecision()]
)
def test_codes_are_written_a_window_at_a_time_and_read_later(setting):
    stream, window = new_stream(setting), setting.window.residual_length
    for part in random_tokens(100, 0).split(1, 2):
        stream.append(part, recording=False)
        (written,) = [run[0].shape[2] for run in stream.runs] or [0]
        assert written == stream.length // window * window
        assert stream.encoded <= written < stream.encoded + window + setting.codec.token_group


@each_setting
def test_no_tensor_keeps_a_larger_one_alive(setting):
    stream = new_stream(setting)
    for seed, num_tokens in enumerate([90, 1, 1, 17, 1]):
        stream.append(random_tokens(num_tokens, seed), recording=False)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in stream.tensors())
    stream.crop(30)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in stream.tensors())
