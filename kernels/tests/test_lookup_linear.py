"""Products with codebooks of scalars: every body, and every form of the CPU's, agrees with float64."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, dequant_matmul, explain, lookup_linear, pack_bits

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


class Problem(NamedTuple):
    x: Tensor
    packed: Tensor
    codebook: Tensor
    scale: Tensor
    bits: int
    group_size: int
    zero_point: Tensor | None


def problem(
    generator, bits, rows, out, n, group_size, dtype=torch.float32, grid_dtype=torch.float32, zero=True
) -> Problem:
    codes = torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=generator)
    scale = torch.rand(out, n // group_size, generator=generator).add(0.1).to(grid_dtype)
    zero_point = torch.randn(out, n // group_size, generator=generator).to(grid_dtype) if zero else None
    codebook = torch.randn(2**bits, generator=generator).to(grid_dtype)
    x = torch.randn(rows, n, generator=generator).to(dtype)
    return Problem(x, pack_bits(codes, bits), codebook, scale, bits, group_size, zero_point)


def weight(p: Problem) -> Tensor:
    """The weights in float64."""
    with backend("reference"):
        return lookup_linear(torch.eye(p.x.shape[-1], dtype=torch.float64), *p[1:]).T


def assert_close(y: Tensor, p: Problem, unit: float = 2e-6) -> None:
    """Each sum is off by at most `unit` times the sum of its terms' magnitudes."""
    W, x = weight(p), p.x.double()
    assert y.dtype == p.x.dtype
    assert y.shape == (*p.x.shape[:-1], len(W))
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ W.abs().T)).all()


def test_weight_is_entry_minus_zero_point_times_scale(body):
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    codebook, scale = torch.tensor([-1.5, 0.0, 0.25, 8.0]), torch.tensor([[1.0, 10.0], [2.0, 4.0]])
    y = lookup_linear(torch.eye(4), pack_bits(codes, 2), codebook, scale, 2, 2)
    assert torch.equal(y.T, torch.tensor([[-1.5, 0.0, 2.5, 80.0], [16.0, 0.5, 0.0, -6.0]]))
    y = lookup_linear(torch.eye(4), pack_bits(codes, 2), codebook, scale, 2, 2, torch.ones(2, 2))
    assert torch.equal(y.T, torch.tensor([[-2.5, -1.0, -7.5, 70.0], [14.0, -1.5, -4.0, -10.0]]))


# (rows of x, out, in, group_size): decoding, batches, prefill; whole vectors, groups of 16, whole rows, ragged
SHAPES = [(1, 33, 256, 32), (1, 5, 512, 16), (1, 3, 256, 256), (5, 7, 256, 64), (12, 9, 256, 128), (3, 5, 100, 20)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_point"])
def test_sums_are_exact_to_float32(body, generator, bits, shape, zero):
    if body == "gpu" and (bits not in (4, 8) or shape[2] == 512):
        pytest.skip("the interpreter is slow, and the kernel dequant_matmul's")
    p = problem(generator, bits, *shape, zero=zero)
    assert_close(lookup_linear(*p), p)


@needs_numba
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 9),
    out=st.integers(1, 5),
    groups=st.integers(1, 20),
    group_size=st.sampled_from([1, 16, 20, 32, 48, 64, 96, 128]),
    grid_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    zero=st.booleans(),
)
def test_any_shape_and_grid(bits, rows, out, groups, group_size, grid_dtype, zero):
    generator = torch.Generator().manual_seed(groups)
    p = problem(generator, bits, rows, out, groups * group_size, group_size, grid_dtype=grid_dtype, zero=zero)
    with backend("cpu"):
        assert_close(lookup_linear(*p), p)


# (rows of x, out, in, group_size): groups as long as a field, within one, across two and across eight
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 512, 64), (3, 2, 1024, 128), (1, 2, 1024, 512), (5, 3, 512, 512)], ids=str)
def test_vectors_of_both_lengths(vectors, guarded, generator, bits, dtype, shape):
    p = problem(generator, bits, *shape, dtype=dtype, zero=shape[0] != 3)
    # which is what they are rounded to with x in bfloat16
    p = p._replace(codebook=p.codebook.to(dtype).float())
    zero_point = None if p.zero_point is None else guarded(p.zero_point)
    y = lookup_linear(*map(guarded, p[:4]), *p[4:6], zero_point)
    assert_close(y, p, 2e-6 if dtype == torch.float32 else 2**-8)
    if dtype == torch.bfloat16:
        # sums are in float32, and rounded once
        assert ((y.double() - p.x.double() @ weight(p).T).abs() <= y.double().abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("grid_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_vectors_of_both_lengths_and_scales_of_any_dtype(vectors, generator, grid_dtype):
    p = problem(generator, 4, 2, 3, 256, 64, grid_dtype=grid_dtype)
    assert_close(lookup_linear(*p), p)


@pytest.mark.parametrize("rows", [1, 6])
def test_vectors_of_both_lengths_on_two_threads(vectors, generator, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p = problem(generator, 4, rows, 517, 512, 64)
        assert_close(lookup_linear(*p), p)
    finally:
        torch.set_num_threads(threads)


@needs_numba
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_plain_loops_serve_other_processors(generator, monkeypatch, bits, rows):
    from tersor.kernels import simd

    p = problem(generator, bits, rows, 7, 256, 64)
    integers = p.packed, p.scale, p.zero_point, bits, 64
    fast = lookup_linear(*p), dequant_matmul(p.x, *integers)
    monkeypatch.setattr(simd.binding, "get_host_cpu_features", lambda: {"avx2": False})
    simd.available.cache_clear()
    try:
        assert not simd.available()
        assert_close(lookup_linear(*p), p)
        torch.testing.assert_close(lookup_linear(*p), fast[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dequant_matmul(p.x, *integers), fast[1], rtol=1e-4, atol=1e-4)
    finally:
        simd.available.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 128, 32), (5, 9, 100, 20), (12, 33, 128, 128)], ids=str)
def test_half_precision(body, generator, shape, dtype):
    p = problem(generator, 4, *shape, dtype=dtype, grid_dtype=dtype)
    # one rounding at the end; the GPU body also rounds the weights, and its interpreter cuts bfloat16 off instead
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_close(lookup_linear(*p), p, rounding * (1 if body != "gpu" else 4 if dtype == torch.bfloat16 else 2))


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_large_enough_for_several_threads(generator, rows, bits):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p = problem(generator, bits, rows, 515, 256, 64)
        assert_close(lookup_linear(*p), p)
    finally:
        torch.set_num_threads(threads)


def test_batch_dimensions_and_strides(body, generator):
    p = problem(generator, 4, 6, 5, 64, 32)
    expected = lookup_linear(*p)
    assert torch.equal(lookup_linear(p.x.view(2, 3, 64), *p[1:]), expected.view(2, 3, 5))
    torch.testing.assert_close(lookup_linear(p.x[0], *p[1:]), expected[0], rtol=1e-5, atol=1e-5)
    x, packed, scale, zero_point = (t.T.contiguous().T for t in (p.x, p.packed, p.scale, p.zero_point))
    strided = lookup_linear(x, packed, p.codebook.repeat_interleave(2)[::2], scale, 4, 32, zero_point)
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 5, 100, 20), (1, 5, 256, 64), (3, 5, 256, 16), (12, 5, 256, 256)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, bits, shape):
    if body == "gpu" and bits != 4:
        pytest.skip("the interpreter is slow, and the kernel dequant_matmul's")
    p = problem(generator, bits, *shape)
    x, packed, codebook, scale, zero_point = (guarded(t) for t in (*p[:4], p.zero_point))
    assert_close(lookup_linear(x, packed, codebook, scale, *p[4:6], zero_point), p)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("rows", [1, 4])
def test_nan_and_infinity_propagate(body, generator, rows):
    p = problem(generator, 4, rows, 5, 128, 32)
    clean = lookup_linear(*p)
    p.scale[2, 1] = float("nan")
    p.zero_point[3, 1] = float("inf")
    y = lookup_linear(*p)
    assert not y[:, 2:4].isfinite().any()
    torch.testing.assert_close(y[:, [0, 1, 4]], clean[:, [0, 1, 4]], rtol=1e-5, atol=1e-5)
    p.x[0, 7] = float("inf")
    assert not lookup_linear(*p)[0].isfinite().any()
    p.x[0, 7] = float("nan")
    assert lookup_linear(*p)[0].isnan().all()


def test_an_entry_that_does_not_occur_may_be_anything(body, generator):
    p = problem(generator, 2, 1, 5, 128, 32)
    p.packed.bitwise_and_(0x55)  # codes 0 and 1
    expected = lookup_linear(*p)
    p.codebook[2:] = torch.tensor([float("nan"), float("inf")])
    assert torch.equal(lookup_linear(*p), expected)


@pytest.mark.parametrize(("rows", "out", "n"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_tensors(body, generator, rows, out, n):
    y = lookup_linear(*problem(generator, 4, rows, out, n, 32))
    assert torch.equal(y, torch.zeros(rows, out))


def test_integers_are_dequant_matmuls(body, generator):
    p = problem(generator, 4, 2, 5, 128, 32)._replace(codebook=torch.arange(16.0))
    assert torch.equal(lookup_linear(*p), dequant_matmul(p.x, p.packed, p.scale, p.zero_point, 4, 32))


def test_bad_arguments_are_named(generator):
    p = problem(generator, 4, 2, 5, 64, 32)

    def expect(error, match, **changed):
        with pytest.raises(error, match="lookup_linear: " + match):
            lookup_linear(*p._replace(**changed))

    expect(TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", x=p.x.long())
    expect(TypeError, "packed must be uint8, got torch.int32", packed=p.packed.int())
    expect(TypeError, "scale must be floating point, got torch.int64", scale=p.scale.long())
    expect(TypeError, "zero_point must be floating point, got torch.uint8", zero_point=p.zero_point.byte())
    expect(TypeError, "codebook must be floating point, got torch.int64", codebook=p.codebook.long())
    expect(ValueError, "codebook is on meta, but x is on cpu", codebook=p.codebook.to("meta"))
    expect(ValueError, r"codebook must have 2\^bits = 16 entries, got the shape \(8,\)", codebook=p.codebook[:8])
    expect(ValueError, "bits must be 1 to 8, got 9", bits=9)
    expect(ValueError, "group_size = 48 does not divide in = 64", group_size=48)
    expect(ValueError, r"scale must be .* = \(5, 2\), got \(4, 2\)", scale=p.scale[:4])


def test_double_precision_is_the_references(generator):
    p = problem(generator, 4, 2, 5, 64, 32, dtype=torch.float64)
    assert explain(lookup_linear, *p).body == "reference"
    assert_close(lookup_linear(*p), p, 1e-14)
    assert torch.autograd.gradcheck(lambda x: lookup_linear(x, *p[1:]), p.x.requires_grad_())


@pytest.mark.parametrize("zero", [True, False])
def test_gradient_of_x(body, generator, zero):
    p = problem(generator, 4, 3, 5, 64, 32, zero=zero)
    x, upstream = p.x.clone().requires_grad_(), torch.randn(3, 5, generator=generator)
    lookup_linear(x, *p[1:]).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ weight(p)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["codebook", "scale", "zero_point"])
def test_gradient_of_the_grid_is_refused(generator, name):
    p = problem(generator, 4, 3, 5, 64, 32)
    getattr(p, name).requires_grad_()
    y = lookup_linear(*p)
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}: detach it"):
        y.sum().backward()


def test_registration_is_sound(generator):
    p = problem(generator, 4, 3, 5, 64, 32)
    torch.library.opcheck(torch.ops.tersor.lookup_linear.default, (p.x.requires_grad_(), *p[1:]))
    p = problem(generator, 2, 1, 5, 20, 10, dtype=torch.bfloat16, zero=False)
    torch.library.opcheck(torch.ops.tersor.lookup_linear.default, p[:-1])


def test_compiles_into_one_graph(generator):
    p = problem(generator, 4, 3, 5, 64, 32)
    compiled = torch.compile(lambda x: lookup_linear(x, *p[1:]) * 2, fullgraph=True, backend="aot_eager")
    x = p.x.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, lookup_linear(*p) * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight(p).sum(0).float().expand(3, -1), rtol=1e-4, atol=1e-4)
