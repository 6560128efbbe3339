"""Products with weights of 8 bits: every body agrees with float64, integer sums are exact, nothing else is read."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, explain, int8_linear, w8a8_linear

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


class IntegerProblem(NamedTuple):
    x: Tensor
    x_scale: Tensor
    weight: Tensor
    scale: Tensor


def some_int8(generator, *shape) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def problem(generator, rows, out, n, groups, dtype=torch.float32, grid_dtype=torch.float32, zero=True) -> Problem:
    scale = torch.rand(out, groups, generator=generator).add(0.1).to(grid_dtype)
    zero_point = torch.randn(out, groups, generator=generator).mul(20).to(grid_dtype) if zero else None
    x = torch.randn(rows, n, generator=generator).to(dtype)
    return Problem(x, some_int8(generator, out, n), scale, zero_point)


def integer_problem(generator, rows, out, n, dtype=torch.float32) -> IntegerProblem:
    x_scale, scale = torch.rand(rows, generator=generator), torch.rand(out, generator=generator)
    return IntegerProblem(
        some_int8(generator, rows, n), x_scale.to(dtype), some_int8(generator, out, n), scale.to(dtype)
    )


def weight(p: Problem) -> Tensor:
    """The weights in float64."""
    with backend("reference"):
        return int8_linear(torch.eye(p.x.shape[-1], dtype=torch.float64), *p[1:]).T


def assert_close(y: Tensor, p: Problem, unit: float = 2e-6) -> None:
    """Each sum is off by at most `unit` times the sum of its terms' magnitudes."""
    W, x = weight(p), p.x.double()
    assert y.dtype == p.x.dtype
    assert y.shape == (*p.x.shape[:-1], len(W))
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ W.abs().T)).all()


# (rows of x, out, in, groups): decoding, batches, prefill; per channel, per group, ragged, single channels as groups
SHAPES = [
    (1, 40, 256, 1),
    (5, 7, 256, 4),
    (40, 33, 128, 1),
    (1, 9, 96, 3),
    (3, 9, 100, 5),
    (1, 3, 7, 7),
    (13, 5, 31, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_point"])
def test_sums_are_exact_to_float32(body, generator, shape, zero):
    p = problem(generator, *shape, zero=zero)
    assert_close(int8_linear(*p), p)


@pytest.mark.parametrize("shape", [(1, 3, 256, 2), (4, 3, 128, 1), (7, 2, 192, 3)], ids=str)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_point"])
def test_vectors_of_both_lengths(vectors, guarded, generator, shape, zero):
    p = problem(generator, *shape, zero=zero)
    # the fence of integers is full of 255, which int8 does not hold
    fenced = guarded(p.x), guarded(p.weight.view(torch.uint8)).view(torch.int8), guarded(p.scale)
    assert_close(int8_linear(*fenced, guarded(p.zero_point) if zero else None), p)
    q = integer_problem(generator, *shape[:3])
    q.x[0], q.weight[0] = -128, -128
    x, weights = (guarded(t.view(torch.uint8)).view(torch.int8) for t in (q.x, q.weight))
    ones = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    assert torch.equal(w8a8_linear(x, ones[0], weights, ones[1]), (q.x.long() @ q.weight.long().T).double())


@pytest.mark.parametrize("rows", [1, 6])
def test_vectors_of_both_lengths_on_two_threads(vectors, generator, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p = problem(generator, rows, 517, 512, 4)
        assert_close(int8_linear(*p), p)
        q = integer_problem(generator, rows, 517, 512)
        ones = torch.ones(rows, dtype=torch.float64), torch.ones(517, dtype=torch.float64)
        assert torch.equal(w8a8_linear(q.x, ones[0], q.weight, ones[1]), (q.x.long() @ q.weight.long().T).double())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_half_precision(body, generator, rows, dtype):
    p = problem(generator, rows, 9, 100, 5, dtype=dtype, grid_dtype=dtype)
    # one rounding at the end; the GPU body also rounds the weights, and its interpreter cuts bfloat16 off instead
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_close(int8_linear(*p), p, rounding * (1 if body != "gpu" else 4 if dtype == torch.bfloat16 else 2))


@needs_numba
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.integers(1, 14),
    out=st.integers(1, 5),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 70),
    zero=st.booleans(),
)
def test_any_shape(rows, out, groups, group_size, zero):
    generator = torch.Generator().manual_seed(group_size)
    p = problem(generator, rows, out, groups * group_size, groups, zero=zero)
    q = integer_problem(generator, rows, out, groups * group_size)
    with backend("cpu"):
        assert_close(int8_linear(*p), p)
        y = w8a8_linear(*q)
    with backend("reference"):
        assert torch.equal(y, w8a8_linear(*q))


@pytest.mark.parametrize("shape", [(1, 40, 256), (5, 7, 1100), (35, 9, 100), (2, 3, 7)], ids=str)
def test_integer_sums_are_exact(body, generator, shape):
    p = integer_problem(generator, *shape)
    p.x[0], p.weight[0] = -128, -128  # the largest products
    ones = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    exact = p.x.long() @ p.weight.long().T
    if body != "gpu":
        assert torch.equal(w8a8_linear(p.x, ones[0], p.weight, ones[1]), exact.double())
    # sums beyond 2^24 are rounded once as they become float32
    assert torch.equal(w8a8_linear(p.x, ones[0].float(), p.weight, ones[1].float()), exact.float())


def test_scales_of_rows_and_channels(body):
    x, W = torch.tensor([[[1, 2]], [[-3, 4]]], dtype=torch.int8), torch.tensor([[5, 6], [7, -8]], dtype=torch.int8)
    y = w8a8_linear(x, torch.tensor([[0.5], [2.0]]), W, torch.tensor([1.0, 0.25]))
    assert torch.equal(y, torch.tensor([[[8.5, -1.125]], [[18.0, -26.5]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integer_products_are_rounded_once_to_the_scales_dtype(body, generator, dtype):
    p = integer_problem(generator, 3, 5, 100, dtype)
    y = w8a8_linear(*p)
    exact = (p.x.double() @ p.weight.double().T) * p.x_scale.double()[:, None] * p.scale.double()
    assert y.dtype == dtype
    # Triton's interpreter cuts bfloat16 off
    torch.testing.assert_close(y.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=0)


@needs_numba
@pytest.mark.parametrize("rows", [1, 20])
def test_plain_torch_serves_other_processors(generator, monkeypatch, rows):
    from tersor.kernels import simd

    p, q = problem(generator, rows, 7, 100, 5), integer_problem(generator, rows, 7, 100)
    fast = w8a8_linear(*q)
    monkeypatch.setattr(simd.binding, "get_host_cpu_features", lambda: {"avx2": False})
    simd.available.cache_clear()
    try:
        assert not simd.available()
        assert_close(int8_linear(*p), p)
        assert torch.equal(w8a8_linear(*q), fast)
    finally:
        simd.available.cache_clear()


@pytest.mark.parametrize("rows", [1, 3, 13])
def test_large_enough_for_several_threads(generator, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p, q = problem(generator, rows, 515, 256, 4), integer_problem(generator, rows, 515, 256)
        assert_close(int8_linear(*p), p)
        assert torch.equal(w8a8_linear(*q), w8a8_linear(*(t.clone() for t in q)))
        with backend("reference"):
            expected = w8a8_linear(*q)
        assert torch.equal(w8a8_linear(*q), expected)
    finally:
        torch.set_num_threads(threads)


def test_batch_dimensions_and_strides(body, generator):
    p, q = problem(generator, 6, 5, 64, 2), integer_problem(generator, 6, 5, 64)
    expected = int8_linear(*p)
    assert torch.equal(int8_linear(p.x.view(2, 3, 64), *p[1:]), expected.view(2, 3, 5))
    torch.testing.assert_close(int8_linear(p.x[0], *p[1:]), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(int8_linear(*(t.T.contiguous().T for t in p)), expected, rtol=1e-5, atol=1e-5)
    expected = w8a8_linear(*q)
    assert torch.equal(w8a8_linear(q.x.view(2, 3, 64), q.x_scale.view(2, 3), *q[2:]), expected.view(2, 3, 5))
    assert torch.equal(w8a8_linear(q.x[0], q.x_scale[0], *q[2:]), expected[0])
    strided = (q.x.T.contiguous().T, q.x_scale.repeat_interleave(2)[::2], q.weight.T.contiguous().T, q.scale)
    assert torch.equal(w8a8_linear(*strided), expected)


@pytest.mark.parametrize("shape", [(1, 5, 100, 5), (3, 5, 64, 1), (40, 5, 31, 1)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, shape):
    p, q = problem(generator, *shape), integer_problem(generator, *shape[:3])
    expected = w8a8_linear(*q)
    # the fence of integers is full of 255, which int8 does not hold
    x, scale, zero_point = guarded(p.x), guarded(p.scale), guarded(p.zero_point)
    assert_close(int8_linear(x, guarded(p.weight.view(torch.uint8)).view(torch.int8), scale, zero_point), p)
    x, W = (guarded(t.view(torch.uint8)).view(torch.int8) for t in (q.x, q.weight))
    assert torch.equal(w8a8_linear(x, guarded(q.x_scale), W, guarded(q.scale)), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("rows", [1, 13])
def test_nan_and_infinity_propagate(body, generator, rows):
    p = problem(generator, rows, 5, 100, 5)
    clean = int8_linear(*p)
    p.scale[2, 1], p.zero_point[3, 1] = float("nan"), float("inf")
    y = int8_linear(*p)
    assert not y[:, 2:4].isfinite().any()
    torch.testing.assert_close(y[:, [0, 1, 4]], clean[:, [0, 1, 4]], rtol=1e-5, atol=1e-4)
    p.x[0, 7] = float("nan")
    assert int8_linear(*p)[0].isnan().all()


@pytest.mark.parametrize(("rows", "out", "n"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_tensors(body, generator, rows, out, n):
    assert torch.equal(int8_linear(*problem(generator, rows, out, n, 1)), torch.zeros(rows, out))
    assert torch.equal(w8a8_linear(*integer_problem(generator, rows, out, n)), torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p, q = problem(generator, 2, 5, 64, 2), integer_problem(generator, 2, 5, 64)

    def expect(op, error, match, arguments):
        with pytest.raises(error, match=f"{op.__name__}: {match}"):
            op(*arguments)

    def linear(error, match, **changed):
        expect(int8_linear, error, match, p._replace(**changed))

    def w8a8(error, match, **changed):
        expect(w8a8_linear, error, match, q._replace(**changed))

    linear(TypeError, "x must be .* got torch.int8; w8a8_linear takes int8", x=q.x)
    linear(TypeError, "weight must be int8, got torch.uint8; for uint8 codes use", weight=p.weight.view(torch.uint8))
    linear(TypeError, "scale must be .* got torch.int64", scale=p.scale.long())
    linear(TypeError, "zero_point must be .* got torch.uint8", zero_point=p.zero_point.byte())
    linear(ValueError, "scale is on meta, but x is on cpu", scale=p.scale.to("meta"))
    linear(ValueError, r"x must be .* got \(2, 63\) and \(5, 64\)", x=p.x[:, :63])
    linear(ValueError, r"scale must be .* got \(5,\); per channel: scale\[:, None\]", scale=p.scale[:, 0])
    linear(ValueError, r"scale must be .* got \(5, 3\)", scale=torch.ones(5, 3))
    linear(ValueError, r"zero_point must have the shape of scale", zero_point=p.zero_point[:, :1])
    w8a8(TypeError, "x must be int8, got torch.float32; int8_linear takes", x=p.x)
    w8a8(TypeError, "x_scale must be .* got torch.int64", x_scale=q.x_scale.long())
    w8a8(ValueError, r"x_scale must have one scale per row of x, \(2,\), got \(2, 1\)", x_scale=q.x_scale[:, None])
    w8a8(ValueError, r"scale must have one scale per row of weight, \(5,\), got \(1,\)", scale=q.scale[:1])
    long = torch.zeros(1, 2**17, dtype=torch.int8)
    w8a8(ValueError, "sums of in = 131072", x=long, x_scale=torch.ones(1), weight=long, scale=torch.ones(1))


def test_double_precision_is_the_references(generator):
    p = problem(generator, 2, 5, 64, 2, dtype=torch.float64)
    assert explain(int8_linear, *p).body == "reference"
    assert_close(int8_linear(*p), p, 1e-14)
    assert torch.autograd.gradcheck(lambda x: int8_linear(x, *p[1:]), p.x.requires_grad_())


@pytest.mark.parametrize("zero", [True, False])
def test_gradients(body, generator, zero):
    p, upstream = problem(generator, 3, 5, 64, 2, zero=zero), torch.randn(3, 5, generator=generator)
    x = p.x.clone().requires_grad_()
    int8_linear(x, *(argument for argument in p[1:] if argument is not None)).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ weight(p)).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_gradient_of_the_grid_is_refused(generator, name):
    p = problem(generator, 3, 5, 64, 2)
    getattr(p, name).requires_grad_()
    y = int8_linear(*p)
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}: detach it"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["x_scale", "scale"])
def test_w8a8_has_no_gradient(generator, name):
    p = integer_problem(generator, 3, 5, 64)
    getattr(p, name).requires_grad_()
    y = w8a8_linear(*p)
    with pytest.raises(NotImplementedError, match="w8a8_linear has no gradient: detach the scales"):
        y.sum().backward()


def test_registration_is_sound(generator):
    p = problem(generator, 3, 5, 64, 2)
    torch.library.opcheck(torch.ops.tersor.int8_linear.default, (p.x.requires_grad_(), *p[1:]))
    p = problem(generator, 1, 5, 20, 1, dtype=torch.bfloat16, zero=False)
    torch.library.opcheck(torch.ops.tersor.int8_linear.default, p[:-1])
    torch.library.opcheck(torch.ops.tersor.w8a8_linear.default, integer_problem(generator, 3, 5, 64))


def test_compiles_into_one_graph(generator):
    p, q = problem(generator, 3, 5, 64, 2), integer_problem(generator, 3, 5, 64)
    compiled = torch.compile(
        lambda x: int8_linear(x, *p[1:]) * 2 + w8a8_linear(*q), fullgraph=True, backend="aot_eager"
    )
    x = p.x.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, int8_linear(*p) * 2 + w8a8_linear(*q))
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight(p).sum(0).float().expand(3, -1), rtol=1e-4, atol=1e-3)
