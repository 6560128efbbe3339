"""Weights of 4 bits times activations of 8: every body agrees with integers of 64 bits, exactly."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, pack_bits, w4a8_linear, w8a8_linear

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


class Problem(NamedTuple):
    x: Tensor
    x_scale: Tensor
    packed: Tensor
    scale: Tensor
    group_scale: Tensor | None = None
    zero_point: Tensor | None = None


def pack(codes: Tensor) -> Tensor:
    return pack_bits(codes.view(torch.uint8) & 15, 4)


def problem(generator, rows, out, n, groups=None, dtype=torch.float32) -> tuple[Problem, Tensor]:
    """With its weights, int64 (out, in). `groups`: integers in groups, such that the weights fit in int8."""
    x = torch.randint(-128, 128, (rows, n), dtype=torch.int8, generator=generator)
    codes = torch.randint(-8, 8, (out, n), dtype=torch.int8, generator=generator)
    x_scale, scale = (torch.rand(size, generator=generator).to(dtype) for size in (rows, out))
    plain = Problem(x, x_scale, pack(codes), scale)
    if groups is None:
        return plain, codes.long()
    group_scale = torch.randint(1, 8, (out, groups), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-8, 8, (out, groups), dtype=torch.int8, generator=generator)
    steps = codes.long().unflatten(-1, (groups, -1)) - zero_point[..., None]
    weight = (steps * group_scale[..., None]).flatten(-2)
    return plain._replace(group_scale=group_scale, zero_point=zero_point), weight


# decoding, batches, prefill; groups that cross the middle of a row, where the halves of the bytes change
SHAPES = [(1, 40, 256), (5, 7, 1100), (35, 9, 100), (2, 3, 7), (3, 6, 1)]
GROUPS = [(1, 40, 256, 2), (5, 7, 192, 3), (35, 9, 100, 5), (2, 3, 7, 7), (3, 5, 96, 1), (1, 4, 640, 5)]


@pytest.mark.parametrize("shape", SHAPES + GROUPS, ids=str)
def test_sums_are_exact(body, generator, shape):
    p, weight = problem(generator, *shape)
    ones = p._replace(x_scale=torch.ones_like(p.x_scale), scale=torch.ones_like(p.scale))
    assert torch.equal(w4a8_linear(*ones), (p.x.long() @ weight.T).float())


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_numbers_in_upper_halves_give_the_bits_of_those_in_bytes(body, generator, shape):
    p, weight = problem(generator, *shape)
    with backend("reference"):
        expected = w8a8_linear(p.x, p.x_scale, weight.to(torch.int8), p.scale)
    # two roundings of products of scales, which a compiler may fuse
    torch.testing.assert_close(w4a8_linear(*p), expected, rtol=2**-22 if body == "gpu" else 0, atol=0)


@needs_numba
@settings(deadline=None, max_examples=40, derandomize=True)
@given(rows=st.integers(1, 4), out=st.integers(1, 5), groups=st.integers(1, 5), group_size=st.integers(1, 150))
def test_any_shape(rows, out, groups, group_size):
    generator = torch.Generator().manual_seed(group_size)
    p, weight = problem(generator, rows, out, groups * group_size, groups)
    expected = (p.x.double() @ weight.double().T).float() * p.scale * p.x_scale[:, None]
    with backend("cpu"):
        assert torch.equal(w4a8_linear(*p), expected)


@pytest.mark.parametrize("missing", ["group_scale", "zero_point"])
def test_either_may_be_missing(body, generator, missing):
    p, _ = problem(generator, 3, 5, 96, 3)
    neutral = {"group_scale": torch.ones_like, "zero_point": torch.zeros_like}[missing]
    expected = w4a8_linear(*p._replace(**{missing: neutral(getattr(p, missing))}))
    assert torch.equal(w4a8_linear(*p._replace(**{missing: None})), expected)


@pytest.mark.slow
def test_the_largest_sums_fit(body):
    """in = 2^17 - 1 products of -128 with 16 * -8, which is as far as int32 goes."""
    if body == "gpu":
        pytest.skip("minutes in the interpreter")
    n = 2**17 - 1
    x, codes = torch.full((1, n), -128, dtype=torch.int8), torch.full((1, n), -8, dtype=torch.int8)
    one = torch.ones(1, dtype=torch.float64)
    assert w4a8_linear(x, one, pack(codes), one).item() == 128 * 8 * n
    weight = w4a8_linear(x, one, pack(codes), one, torch.full((1, 1), 16, dtype=torch.int8))
    assert weight.item() == 128 * 128 * n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_rounded_once_to_the_scales_dtype(body, generator, dtype):
    p, weight = problem(generator, 3, 5, 100, 5, dtype)
    y = w4a8_linear(*p)
    exact = (p.x.double() @ weight.double().T) * p.x_scale.double()[:, None] * p.scale.double()
    assert y.dtype == dtype
    # Triton's interpreter cuts bfloat16 off
    torch.testing.assert_close(y.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=0)


@needs_numba
@pytest.mark.parametrize("rows", [1, 40])
def test_plain_torch_serves_other_processors(generator, monkeypatch, rows):
    from tersor.kernels import simd

    p, weight = problem(generator, rows, 7, 100, 5)
    expected = (p.x.double() @ weight.double().T).float() * p.scale * p.x_scale[:, None]
    monkeypatch.setattr(simd.binding, "get_host_cpu_features", lambda: {"avx2": False})
    simd.available.cache_clear()
    try:
        assert torch.equal(w4a8_linear(*p), expected)
    finally:
        simd.available.cache_clear()


def test_large_enough_for_several_threads(generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p, weight = problem(generator, 3, 1030, 256, 2)
        expected = (p.x.double() @ weight.double().T).float() * p.scale * p.x_scale[:, None]
        assert torch.equal(w4a8_linear(*p), expected)
    finally:
        torch.set_num_threads(threads)


def test_batch_dimensions_and_strides(body, generator):
    p, _ = problem(generator, 6, 5, 64, 2)
    expected = w4a8_linear(*p)
    assert torch.equal(w4a8_linear(p.x.view(2, 3, 64), p.x_scale.view(2, 3), *p[2:]), expected.view(2, 3, 5))
    assert torch.equal(w4a8_linear(p.x[0], p.x_scale[0], *p[2:]), expected[0])
    strided = (p.x.T.contiguous().T, p.x_scale.repeat_interleave(2)[::2], p.packed.T.contiguous().T, p.scale)
    assert torch.equal(w4a8_linear(*strided, *(t.T.contiguous().T for t in p[4:])), expected)


@pytest.mark.parametrize("shape", [(1, 5, 100, 5), (3, 5, 64, 1), (40, 5, 31, 1)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, shape):
    p, _ = problem(generator, *shape)
    expected = w4a8_linear(*p)
    # the fence of integers is full of 255, which int8 does not hold
    x, group_scale, zero_point = (
        guarded(t.view(torch.uint8)).view(torch.int8) for t in (p.x, p.group_scale, p.zero_point)
    )
    inside = x, guarded(p.x_scale), guarded(p.packed), guarded(p.scale), group_scale, zero_point
    assert torch.equal(w4a8_linear(*inside), expected)


@pytest.mark.parametrize(("rows", "out", "n"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_tensors(body, generator, rows, out, n):
    assert torch.equal(w4a8_linear(*problem(generator, rows, out, n)[0]), torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p, _ = problem(generator, 2, 5, 64, 2)

    def expect(error, match, **changed):
        with pytest.raises(error, match=f"w4a8_linear: {match}"):
            w4a8_linear(*p._replace(**changed))

    expect(TypeError, "x must be int8, got torch.float32", x=p.x.float())
    expect(TypeError, "packed must be uint8, got torch.int8; pack_bits makes it", packed=p.packed.view(torch.int8))
    expect(TypeError, "zero_point must be int8, got torch.uint8", zero_point=p.zero_point.view(torch.uint8))
    expect(TypeError, "x_scale must be .* got torch.int64", x_scale=p.x_scale.long())
    expect(ValueError, "scale is on meta, but x is on cpu", scale=p.scale.to("meta"))
    expect(ValueError, r"x must be .* got \(2, 56\) and \(5, 32\)", x=p.x[:, :56])
    expect(ValueError, r"x_scale must have one scale per row of x, \(2,\), got \(2, 1\)", x_scale=p.x_scale[:, None])
    expect(ValueError, r"scale must have one scale per row of packed, \(5,\), got \(1,\)", scale=p.scale[:1])
    expect(ValueError, r"group_scale must be .* got \(5, 3\)", group_scale=torch.ones(5, 3, dtype=torch.int8))
    expect(ValueError, "group_scale and zero_point must have one shape", zero_point=p.zero_point[:, :1])
    long = torch.zeros(1, 2**17, dtype=torch.int8)
    grid = {"group_scale": None, "zero_point": None}
    one = torch.ones(1)
    expect(ValueError, "sums of in = 131072", x=long, x_scale=one, packed=pack(long), scale=one, **grid)


@pytest.mark.parametrize("name", ["x_scale", "scale"])
def test_it_has_no_gradient(generator, name):
    p, _ = problem(generator, 3, 5, 64)
    getattr(p, name).requires_grad_()
    y = w4a8_linear(*p)
    with pytest.raises(NotImplementedError, match="w4a8_linear has no gradient: detach the scales"):
        y.sum().backward()


def test_registration_is_sound(generator):
    torch.library.opcheck(torch.ops.tersor.w4a8_linear.default, problem(generator, 3, 5, 64, 2)[0])
    torch.library.opcheck(torch.ops.tersor.w4a8_linear.default, problem(generator, 3, 5, 20)[0][:4])


def test_compiles_into_one_graph(generator):
    p, _ = problem(generator, 3, 5, 64, 2)
    compiled = torch.compile(lambda x: w4a8_linear(x, *p[1:]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x), w4a8_linear(*p) * 2)
