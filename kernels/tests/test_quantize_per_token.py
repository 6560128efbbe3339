"""Activations rounded as they come: what is rounded, and that every body rounds alike."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, quantize_per_token

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 5), (2, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_number_moves_by_more_than_half_a_step(body, generator, bits, group_size, dtype):
    x = torch.randn(3, 2, 160, generator=generator).to(dtype)
    codes, scale = quantize_per_token(x, bits, group_size)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    groups = scale.shape[-1]
    assert groups == 160 // (group_size or 160)
    restored = codes.unflatten(-1, (groups, -1)) * scale[..., None]
    error = (restored - x.float().unflatten(-1, (groups, -1))).abs()
    assert (error <= scale[..., None] * 0.50001).all()
    top = 2 ** (bits - 1) - 1
    assert (codes.abs() <= top).all()
    # the largest of each group is at the end of the levels
    assert (codes.unflatten(-1, (groups, -1)).abs().amax(-1) == top).all()


@needs_numba
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 70),
    bits=st.integers(2, 8),
    clip=st.sampled_from([0.5, 0.9, 1.0]),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_the_cpu_rounds_as_the_reference_does(rows, groups, size, bits, clip, magnitude):
    generator = torch.Generator().manual_seed(size)
    x = magnitude * torch.randn(rows, groups * size, generator=generator)
    x[0] = 0
    results = []
    for body in ("reference", "cpu"):
        with backend(body):
            results.append(quantize_per_token(x, bits, size, clip))
    for ours, expected in zip(*results):
        assert torch.equal(ours, expected)


def test_what_is_clipped_is_at_the_end_of_the_levels(body):
    codes, scale = quantize_per_token(torch.tensor([[10.0, -10.0, 4.0, 0.0]]), clip=0.5)
    torch.testing.assert_close(scale, torch.tensor([[5 / 127]]))
    assert codes.tolist() == [[127, -127, 102, 0]]


def test_ties_go_to_the_even_code(body):
    codes, _ = quantize_per_token(torch.tensor([[0.5, 1.5, 2.5, -0.5, 127.0]]))
    assert codes.tolist() == [[0, 2, 2, 0, 127]]


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_zeros_stay_zeros(body, value):
    """So do numbers whose scale would be none."""
    codes, scale = quantize_per_token(torch.full((2, 64), value), group_size=32)
    assert not codes.any()
    assert torch.equal(scale, torch.ones(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_shows_in_the_scale_of_its_group(body, value):
    x = torch.ones(2, 64)
    x[0, 3] = value
    _, scale = quantize_per_token(x, group_size=32)
    assert not scale[0, 0].isfinite()
    torch.testing.assert_close(scale.flatten()[1:], torch.full((3,), 1 / 127))


def test_strides_and_slices(body, generator, guarded):
    x = torch.randn(5, 64, generator=generator)
    expected = quantize_per_token(x)
    for same in (x.T.contiguous().T, guarded(x)):
        assert all(torch.equal(a, b) for a, b in zip(quantize_per_token(same), expected))
    codes, scale = quantize_per_token(x[0])
    assert torch.equal(codes, expected[0][0])
    assert torch.equal(scale, expected[1][0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_tensors(body, shape):
    codes, scale = quantize_per_token(torch.zeros(shape))
    assert codes.shape == shape
    assert torch.equal(scale, torch.ones(shape[0], 1))


def test_bad_arguments_are_named():
    x = torch.ones(2, 64)
    for error, match, args in (
        (TypeError, "x must be .* got torch.int64", (x.long(),)),
        (ValueError, r"x must be \(\.\.\., in\)", (torch.tensor(1.0),)),
        (ValueError, "bits must be 2 to 8, got 1", (x, 1)),
        (ValueError, "group_size = 5 does not divide in = 64", (x, 8, 5)),
        (ValueError, "clip must be above 0 and at most 1, got 1.5", (x, 8, None, 1.5)),
    ):
        with pytest.raises(error, match=f"quantize_per_token: {match}"):
            quantize_per_token(*args)


def test_it_has_no_gradient(generator):
    _, scale = quantize_per_token(torch.randn(2, 8, generator=generator, requires_grad=True))
    with pytest.raises(NotImplementedError, match="quantize_per_token has no gradient: round with"):
        scale.sum().backward()


def test_registration_is_sound(generator):
    x = torch.randn(3, 64, generator=generator)
    torch.library.opcheck(torch.ops.tersor.quantize_per_token.default, (x, 8, 32, 0.9))
    torch.library.opcheck(torch.ops.tersor.quantize_per_token.default, (x.double().mT.contiguous().mT,))
    torch.library.opcheck(torch.ops.tersor.quantize_per_token.default, (x.bfloat16(),))
