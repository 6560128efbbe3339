"""Weights of 1 to 8 bits in groups times activations of 8: every body agrees with exact arithmetic."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, dequant_matmul, pack_bits, quantize_per_token, wna8_linear

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


class Problem(NamedTuple):
    x: Tensor
    x_scale: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int


def problem(generator, bits, rows, out, n, group_size, x_groups=1, dtype=torch.float32) -> tuple[Problem, Tensor]:
    """With its result in float64."""
    groups = n // group_size
    x = torch.randint(-128, 128, (rows, n), dtype=torch.int8, generator=generator)
    codes = torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=generator)
    x_scale = torch.rand(rows, x_groups, generator=generator).to(dtype) + 0.1
    scale = (torch.rand(out, groups, generator=generator) + 0.1).to(dtype)
    zero_point = (torch.rand(out, groups, generator=generator) * 2**bits).to(dtype)
    weight = (codes.unflatten(-1, (groups, -1)) - zero_point[..., None].double()) * scale[..., None].double()
    rounded = x.unflatten(-1, (x_groups, -1)) * x_scale[..., None].double()
    expected = rounded.flatten(-2) @ weight.flatten(-2).T
    return Problem(x, x_scale, pack_bits(codes, bits), scale, zero_point, bits, group_size), expected


def assert_close(y: Tensor, expected: Tensor, p: Problem) -> None:
    """Within roundings of float32 of all that is added up, zero points apart, and one of the result."""
    largest = 128 * 2**p.bits * p.x.shape[-1] * p.scale.max().double() * p.x_scale.max().double()
    rtol = torch.finfo(y.dtype).eps if y.dtype != torch.float32 else 0
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=float(largest) * 2**-22)


# decoding, batches, prefill; groups of the vectors' width and others, x with as many scales
SHAPES = [
    (1, 40, 256, 128, 1),
    (1, 5, 512, 64, 8),
    (5, 7, 192, 64, 3),
    (20, 9, 96, 32, 1),
    (3, 3, 40, 8, 5),
    (2, 3, 7, 7, 1),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_exact_arithmetic(body, generator, bits, shape):
    if body == "gpu" and bits not in (3, 4, 8):
        pytest.skip("the interpreter takes its time")
    p, expected = problem(generator, bits, *shape)
    assert_close(wna8_linear(*p), expected, p)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [128, 160, 2048])
def test_the_largest_products_do_not_saturate(body, bits, n):
    """-128 times the highest code, everywhere: sums of two do not fit in int16 for codes of 8 bits."""
    if body == "gpu" and n > 128:
        pytest.skip("the interpreter takes its time")
    packed = pack_bits(torch.full((3, n), 2**bits - 1, dtype=torch.uint8), bits)
    x, one = torch.full((1, n), -128, dtype=torch.int8), torch.ones(3, 1)
    y = wna8_linear(x, torch.ones(1, 1), packed, one, torch.zeros(3, 1), bits, n)
    assert torch.equal(y, torch.full((1, 3), -128.0 * n * (2**bits - 1)))


# (rows of x, out, in, group_size, groups of x)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 3, 512, 64, 1), (4, 3, 1024, 128, 8), (9, 2, 9216, 64, 144)], ids=str)
def test_vectors_of_both_lengths(vectors, guarded, generator, bits, shape):
    p, expected = problem(generator, bits, *shape)
    x = guarded(p.x.view(torch.uint8)).view(torch.int8)
    assert_close(wna8_linear(x, *map(guarded, p[1:5]), *p[5:]), expected, p)


@pytest.mark.parametrize("rows", [1, 7])
def test_vectors_of_both_lengths_on_two_threads(vectors, generator, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p, expected = problem(generator, 4, rows, 517, 512, 128)
        assert_close(wna8_linear(*p), expected, p)
    finally:
        torch.set_num_threads(threads)


@needs_numba
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    out=st.integers(1, 5),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([1, 5, 8, 16, 32, 64, 96, 160, 256]),
    per_group=st.booleans(),
)
def test_any_shape(bits, rows, out, groups, group_size, per_group):
    generator = torch.Generator().manual_seed(group_size)
    p, expected = problem(generator, bits, rows, out, groups * group_size, group_size, groups if per_group else 1)
    with backend("cpu"):
        assert_close(wna8_linear(*p), expected, p)


def test_it_is_dequant_matmul_of_rounded_inputs(body, generator):
    p, _ = problem(generator, 4, 3, 8, 256, 64)
    values = torch.randn(3, 256, generator=generator)
    x, x_scale = quantize_per_token(values)
    y = wna8_linear(x, x_scale, *p[2:])
    torch.testing.assert_close(y, dequant_matmul(x * x_scale, *p[2:]), rtol=1e-4, atol=1e-3)
    exact = dequant_matmul(values, *p[2:])
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once_to_the_dtype_of_the_scales(body, generator, dtype):
    p, expected = problem(generator, 4, 3, 5, 128, 64, dtype=dtype)
    y = wna8_linear(*p._replace(x_scale=p.x_scale / 64))
    assert y.dtype == dtype
    # Triton's interpreter cuts bfloat16 off
    rtol = torch.finfo(dtype).eps * (2 if body == "gpu" else 1)
    torch.testing.assert_close(y.double(), expected / 64, rtol=rtol, atol=0.01)


@needs_numba
@pytest.mark.parametrize("rows", [1, 40])
def test_plain_torch_serves_other_processors(generator, monkeypatch, rows):
    from tersor.kernels import simd

    p, expected = problem(generator, 4, rows, 7, 128, 64)
    monkeypatch.setattr(simd.binding, "get_host_cpu_features", lambda: {"avx2": False})
    simd.available.cache_clear()
    try:
        assert_close(wna8_linear(*p), expected, p)
    finally:
        simd.available.cache_clear()


@needs_numba
@pytest.mark.parametrize("bits", [3, 4])
def test_large_enough_for_several_threads(generator, bits):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p, expected = problem(generator, bits, 2, 1030, 384, 128)
        assert_close(wna8_linear(*p), expected, p)
    finally:
        torch.set_num_threads(threads)


def test_batch_dimensions_and_strides(body, generator):
    p, _ = problem(generator, 4, 6, 5, 128, 64, 2)
    expected = wna8_linear(*p)
    assert torch.equal(wna8_linear(p.x.view(2, 3, 128), p.x_scale.view(2, 3, 2), *p[2:]), expected.view(2, 3, 5))
    assert torch.equal(wna8_linear(p.x[0], p.x_scale[0], *p[2:]), expected[0])
    strided = [t.T.contiguous().T for t in p[:5]]
    assert torch.equal(wna8_linear(*strided, *p[5:]), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nothing_outside_is_read_or_written(body, generator, guarded, bits, rows):
    if body == "gpu" and bits == 3:
        pytest.skip("the interpreter takes its time")
    p, _ = problem(generator, bits, rows, 3, 96, 32)
    # the fence of integers is full of 255, which int8 does not hold
    x = guarded(p.x.view(torch.uint8)).view(torch.int8)
    assert torch.equal(wna8_linear(x, *map(guarded, p[1:5]), *p[5:]), wna8_linear(*p))


@pytest.mark.parametrize(("rows", "out", "n"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_tensors(body, rows, out, n):
    packed, grid = torch.zeros(out, n // 2, dtype=torch.uint8), torch.ones(out, n // 32)
    y = wna8_linear(torch.zeros(rows, n, dtype=torch.int8), torch.ones(rows, 1), packed, grid, grid, 4, 32)
    assert torch.equal(y, torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p, _ = problem(generator, 4, 2, 5, 64, 32)

    def expect(error, match, **changed):
        with pytest.raises(error, match=f"wna8_linear: {match}"):
            wna8_linear(*p._replace(**changed))

    expect(TypeError, "x must be int8, got torch.float32; quantize_per_token makes it", x=p.x.float())
    expect(TypeError, "x_scale must be floating point, got torch.int64", x_scale=p.x_scale.long())
    expect(TypeError, "packed must be uint8, got torch.int8", packed=p.packed.view(torch.int8))
    expect(ValueError, "x_scale is on meta, but x is on cpu", x_scale=p.x_scale.to("meta"))
    expect(ValueError, r"x_scale must be .* = \(2, 2\), got \(2, 3\)", x_scale=torch.ones(2, 3))
    expect(ValueError, r"x_scale must be .* got \(2,\)", x_scale=torch.ones(2))
    expect(ValueError, "group_size = 5 does not divide in = 64", group_size=5)
    n = 2**16
    long = torch.zeros(1, n, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, n // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="wna8_linear: sums of group_size = 65536"):
        wna8_linear(*long, torch.ones(1, 1), torch.ones(1, 1), 4, n)


def test_it_has_no_gradient(generator):
    p, _ = problem(generator, 4, 3, 5, 64, 32)
    p.scale.requires_grad_()
    with pytest.raises(NotImplementedError, match="wna8_linear has no gradient: detach the scales"):
        wna8_linear(*p).sum().backward()


def test_registration_is_sound(generator):
    torch.library.opcheck(torch.ops.tersor.wna8_linear.default, problem(generator, 4, 3, 5, 64, 32)[0])


def test_compiles_into_one_graph(generator):
    p, _ = problem(generator, 4, 3, 5, 64, 32)

    def layer(values):
        return wna8_linear(*quantize_per_token(values), *p[2:])

    values = torch.randn(3, 64, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), layer(values))
