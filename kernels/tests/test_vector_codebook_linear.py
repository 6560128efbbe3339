"""Products with additive codebooks: every body agrees with float64, with tables and with gathers."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, explain, vector_codebook_linear

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


class Problem(NamedTuple):
    x: Tensor
    codes: Tensor
    codebooks: Tensor
    scale: Tensor


def problem(
    generator, rows, out, groups, group_size, num_codebooks, bits, dtype=torch.float32, grid_dtype=torch.float32
) -> Problem:
    codes = torch.randint(0, 2**bits, (out, groups, num_codebooks), generator=generator)
    codebooks = torch.randn(num_codebooks, 2**bits, group_size, generator=generator).to(grid_dtype)
    scale = torch.rand(out, generator=generator).add(0.1).to(grid_dtype)
    x = torch.randn(rows, groups * group_size, generator=generator).to(dtype)
    return Problem(x, codes.to(torch.uint8 if bits <= 8 else torch.uint16), codebooks, scale)


def weight(p: Problem) -> Tensor:
    """The weights in float64."""
    with backend("reference"):
        return vector_codebook_linear(torch.eye(p.x.shape[-1], dtype=torch.float64), *p[1:]).T


def assert_close(y: Tensor, p: Problem, unit: float = 2e-6) -> None:
    """Each sum is off by at most `unit` times the sum of its terms' magnitudes, which cancel within a weight, too."""
    magnitudes = p._replace(codebooks=p.codebooks.abs())
    W, x = weight(p), p.x.double()
    assert y.dtype == p.x.dtype
    assert y.shape == (*p.x.shape[:-1], len(W))
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ weight(magnitudes).T)).all()


# (rows of x, out, groups, group_size, codebooks, bits): 2x8, 1x4 by tables, then by gathers; 1x12; single weights
SHAPES = [
    (1, 600, 8, 8, 2, 8),
    (3, 40, 5, 4, 2, 4),
    (1, 9, 4, 8, 2, 8),
    (9, 33, 8, 8, 1, 4),
    (2, 5, 3, 8, 1, 12),
    (1, 5, 7, 1, 3, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_to_float32(body, generator, shape):
    p = problem(generator, *shape)
    assert_close(vector_codebook_linear(*p), p)


def test_weight_is_the_scaled_sum_of_entries(body):
    codes = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]]], dtype=torch.uint8)
    codebooks = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    y = vector_codebook_linear(torch.eye(4), codes, codebooks, torch.tensor([1.0, 0.5]))
    assert torch.equal(y.T, torch.tensor([[31.0, 42.0, 33.0, 44.0], [6.5, 12.0, 5.5, 11.0]]))


@pytest.mark.parametrize("rows", [1, 9])
def test_higher_bits_of_a_code_are_ignored(body, generator, rows):
    p = problem(generator, rows, 40, 4, 8, 2, 4)
    assert torch.equal(vector_codebook_linear(*p._replace(codes=p.codes | 0xF0)), vector_codebook_linear(*p))


@needs_numba
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.integers(1, 6),
    out=st.integers(1, 40),
    groups=st.integers(1, 9),
    group_size=st.integers(1, 16),
    num_codebooks=st.integers(1, 3),
    bits=st.integers(0, 5),
)
def test_any_shape(rows, out, groups, group_size, num_codebooks, bits):
    p = problem(torch.Generator().manual_seed(out), rows, out, groups, group_size, num_codebooks, bits)
    with backend("cpu"):
        assert_close(vector_codebook_linear(*p), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_half_precision(body, generator, rows, dtype):
    p = problem(generator, rows, 40, 5, 8, 2, 4, dtype=dtype, grid_dtype=dtype)
    # one rounding at the end; the GPU body also rounds the weights, and its interpreter cuts bfloat16 off instead
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    y = vector_codebook_linear(*p)
    assert_close(y, p, rounding * (1 if body != "gpu" else 4 if dtype == torch.bfloat16 else 2))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("bits", [4, 9])
def test_large_enough_for_several_threads(generator, rows, bits):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p = problem(generator, rows, 2100, 32, 4, 2, bits)
        assert_close(vector_codebook_linear(*p), p)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [6, 2])  # blocks, and sums of x with every entry
def test_batch_dimensions_and_strides(body, generator, rows):
    p = problem(generator, rows, 40, 5, 8, 2, 4)
    expected = vector_codebook_linear(*p)
    assert torch.equal(vector_codebook_linear(p.x.view(2, -1, 40), *p[1:]), expected.view(2, -1, 40))
    torch.testing.assert_close(vector_codebook_linear(p.x[0], *p[1:]), expected[0], rtol=1e-4, atol=1e-4)
    strided = (p.x.T.contiguous().T, p.codes.mT.contiguous().mT, p.codebooks.mT.contiguous().mT, p.scale)
    torch.testing.assert_close(vector_codebook_linear(*strided), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
def test_nothing_outside_is_read_or_written(body, generator, guarded, rows):
    p = problem(generator, rows, 35, 5, 8, 2, 4)
    assert_close(vector_codebook_linear(*(guarded(t) for t in p)), p)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("rows", [1, 9])
def test_nan_and_infinity_propagate(body, generator, rows):
    p = problem(generator, rows, 40, 5, 8, 2, 4)
    p.codes[0], p.codes[1:] = 15, p.codes[1:].clamp(max=14)
    p.codebooks[1, 15] = float("nan")
    p.scale[1] = float("inf")
    y = vector_codebook_linear(*p)
    assert not y[:, :2].isfinite().any()
    assert y[:, 2:].isfinite().all()
    p.x[0, 3] = float("nan")
    assert vector_codebook_linear(*p)[0].isnan().all()


@pytest.mark.parametrize(("rows", "out", "groups"), [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_tensors(body, generator, rows, out, groups):
    y = vector_codebook_linear(*problem(generator, rows, out, groups, 8, 2, 4))
    assert torch.equal(y, torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p = problem(generator, 2, 5, 4, 8, 2, 4)

    def expect(error, match, **changed):
        with pytest.raises(error, match="vector_codebook_linear: " + match):
            vector_codebook_linear(*p._replace(**changed))

    expect(TypeError, "x must be .* got torch.int64", x=p.x.long())
    expect(TypeError, "codes must be uint8 or uint16, got torch.int64", codes=p.codes.long())
    expect(TypeError, "codebooks must be .* got torch.int64", codebooks=p.codebooks.long())
    expect(ValueError, "codebooks is on meta, but x is on cpu", codebooks=p.codebooks.to("meta"))
    expect(ValueError, r"x must be \(..., in\), .* got \(2, 32\), \(5, 4\)", codes=p.codes[..., 0])
    expect(ValueError, "codes are of 1 codebooks, but codebooks holds 2", codes=p.codes[..., :1])
    expect(ValueError, "x has in = 31, but codes are of 4 groups of 8", x=p.x[:, :31])
    expect(
        ValueError,
        r"a codebook must have 2\^bits entries, at most 256 for torch.uint8 .*, got 15",
        codebooks=p.codebooks[:, 1:],
    )
    expect(ValueError, "a codebook must .* at most 256 .*, got 512", codebooks=torch.ones(2, 512, 8))
    expect(ValueError, r"scale must be \(out,\) = \(5,\), got \(5, 1\)", scale=p.scale[:, None])


def test_double_precision_is_the_references(generator):
    p = problem(generator, 2, 5, 4, 8, 2, 4, dtype=torch.float64)
    assert explain(vector_codebook_linear, *p).body == "reference"
    assert_close(vector_codebook_linear(*p), p, 1e-14)
    assert torch.autograd.gradcheck(lambda x: vector_codebook_linear(x, *p[1:]), p.x.requires_grad_())


def test_gradient_of_x(body, generator):
    p = problem(generator, 3, 5, 4, 8, 2, 4)
    x, upstream = p.x.clone().requires_grad_(), torch.randn(3, 5, generator=generator)
    vector_codebook_linear(x, *p[1:]).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ weight(p)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["codebooks", "scale"])
def test_gradient_of_the_grid_is_refused(generator, name):
    p = problem(generator, 3, 5, 4, 8, 2, 4)
    getattr(p, name).requires_grad_()
    y = vector_codebook_linear(*p)
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}: detach it"):
        y.sum().backward()


def test_registration_is_sound(generator):
    p = problem(generator, 3, 40, 4, 8, 2, 4)
    torch.library.opcheck(torch.ops.tersor.vector_codebook_linear.default, (p.x.requires_grad_(), *p[1:]))
    p = problem(generator, 1, 5, 4, 8, 1, 9, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tersor.vector_codebook_linear.default, p)


def test_compiles_into_one_graph(generator):
    p = problem(generator, 3, 40, 4, 8, 2, 4)
    compiled = torch.compile(lambda x: vector_codebook_linear(x, *p[1:]) * 2, fullgraph=True, backend="aot_eager")
    x = p.x.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, vector_codebook_linear(*p) * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight(p).sum(0).float().expand(3, -1), rtol=1e-4, atol=1e-4)
