"""The butterfly: orthogonal for any angles, the Hadamard transform for one choice of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, explain, hadamard
from tersor.kernels.butterfly import butterfly

# (stages, n): one block, many, and widths that are no power of two
SHAPES = [(0, 3), (1, 2), (3, 8), (8, 256), (2, 12), (1, 6), (5, 160)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def some_angles(generator, stages, n):
    return torch.rand(stages, n // 2, generator=generator).sub(0.5).mul(20)


def dense(angles, n):
    """B as a matrix of float64, rotation by rotation from the definition."""
    B = torch.eye(n, dtype=torch.float64)
    for k, stage in enumerate(angles.double()):
        firsts = [i for i in range(n) if not i >> k & 1]
        G = torch.eye(n, dtype=torch.float64)
        for i, t in zip(firsts, stage):
            j = i + 2**k
            G[i, i], G[i, j], G[j, i], G[j, j] = t.cos(), -t.sin(), t.sin(), t.cos()
        B = G @ B
    return B


@pytest.mark.parametrize(("stages", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_product_of_its_rotations(body, generator, stages, n, dtype):
    x, angles = torch.randn(3, n, generator=generator).to(dtype), some_angles(generator, stages, n)
    B = dense(angles, n)
    # Triton's interpreter cuts bfloat16 off instead of rounding
    bound = ROUNDING[dtype] * (2 if body == "gpu" and dtype == torch.bfloat16 else 1)
    for y, matrix in ((butterfly(x, angles), B), (butterfly(x, angles, transpose=True), B.T)):
        assert y.dtype == dtype
        assert (y.double() - x.double() @ matrix.T).norm() <= bound * x.double().norm()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_transpose_is_the_inverse(stages, blocks, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    n = blocks * 2**stages
    x, angles = torch.randn(rows, n, generator=generator), some_angles(generator, stages, n)
    y = butterfly(x, angles)
    with backend("reference"):
        torch.testing.assert_close(y, butterfly(x, angles), rtol=0, atol=1e-5)
    torch.testing.assert_close(butterfly(y, angles, True), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [1, 4, 9])
def test_quarter_turns_are_hadamards(body, generator, stages):
    n = 2**stages
    x = torch.randn(2, n, generator=generator)
    signs = torch.tensor([(-1.0) ** i.bit_count() for i in range(n)])
    y = butterfly(x, torch.full((stages, n // 2), torch.pi / 4))
    torch.testing.assert_close(y, hadamard(x * signs), rtol=0, atol=1e-5)


def test_angles_of_zero_change_nothing(body, generator):
    x = torch.randn(2, 16, generator=generator)
    assert torch.equal(butterfly(x, torch.zeros(4, 8)), x)


def test_large_enough_for_several_threads(generator):
    x, angles = torch.randn(70, 1536, generator=generator), some_angles(generator, 9, 1536)
    y = butterfly(x, angles)
    with backend("reference"):
        torch.testing.assert_close(y, butterfly(x, angles), rtol=0, atol=1e-5)


def test_double_precision(generator):
    x, angles = torch.randn(2, 16, generator=generator).double(), some_angles(generator, 4, 16).double()
    assert explain(butterfly, x, angles).body == "cpu"
    torch.testing.assert_close(butterfly(x, angles), x @ dense(angles, 16).T, rtol=0, atol=1e-14)


def test_strided_inputs(body, generator):
    x, angles = torch.randn(16, 3, generator=generator).T, some_angles(generator, 4, 16)
    expected = butterfly(x.contiguous(), angles)
    assert torch.equal(butterfly(x, angles.T.contiguous().T), expected)
    assert torch.equal(butterfly(x.view(3, 1, 16), angles), expected.view(3, 1, 16))


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    for stages, n in SHAPES[1:]:
        x, angles = torch.randn(3, n, generator=generator), some_angles(generator, stages, n)
        for transpose in (False, True):
            assert torch.equal(butterfly(guarded(x), guarded(angles), transpose), butterfly(x, angles, transpose))


def test_nan_stays_in_its_block(body):
    x = torch.ones(2, 24)
    x[1, 9] = float("nan")
    holes = butterfly(x, torch.ones(3, 12)).isnan()
    assert holes[1, 8:16].all()
    assert holes.sum() == 8


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty_tensors(body, shape):
    assert butterfly(torch.ones(shape), torch.ones(3, shape[1] // 2)).shape == shape


def test_result_is_never_the_input(body):
    x = torch.ones(3, 4)
    butterfly(x, torch.zeros(0, 2)).zero_()
    assert torch.equal(x, torch.ones(3, 4))


def test_bad_arguments_are_named():
    x, angles = torch.ones(2, 24), torch.ones(3, 12)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64, got torch.int64"):
        butterfly(x.long(), angles)
    with pytest.raises(TypeError, match="angles must be float16, .* got torch.int64"):
        butterfly(x, angles.long())
    with pytest.raises(ValueError, match="angles are on meta, but x is on cpu"):
        butterfly(x, angles.to("meta"))
    with pytest.raises(ValueError, match="4 stages need n to be a multiple of 16; n = 24 allows 3"):
        butterfly(x, torch.ones(4, 12))
    with pytest.raises(ValueError, match=r"angles must be \(stages, n / 2\) = \(3, 12\) for n = 24, got \(3, 24\)"):
        butterfly(x, torch.ones(3, 24))
    with pytest.raises(ValueError, match=r"x must be \(..., n\) and angles \(stages, n / 2\)"):
        butterfly(x, angles[0])


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_of_both_orders(generator, transpose):
    x = torch.randn(2, 12, generator=generator).double().requires_grad_()
    angles = some_angles(generator, 2, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, angles: butterfly(x, angles, transpose), (x, angles))
    assert torch.autograd.gradgradcheck(lambda x, angles: butterfly(x, angles, transpose), (x, angles))


def test_gradient_from_every_body(body, generator):
    x, angles = torch.randn(3, 16, generator=generator), some_angles(generator, 4, 16)
    upstream = torch.randn(3, 16, generator=generator)
    x.requires_grad_(), angles.requires_grad_()
    butterfly(x, angles).backward(upstream)
    torch.testing.assert_close(x.grad, butterfly(upstream, angles.detach(), True), rtol=0, atol=1e-5)
    with backend("reference"):
        (expected,) = torch.autograd.grad(butterfly(x, angles), angles, upstream)
    torch.testing.assert_close(angles.grad, expected, rtol=0, atol=1e-5)


def test_registration_is_sound(generator):
    x, angles = torch.randn(2, 12, generator=generator), some_angles(generator, 2, 12)
    op = torch.ops.tersor.butterfly.default
    torch.library.opcheck(op, (x.requires_grad_(), angles.requires_grad_()))
    torch.library.opcheck(op, (x.detach().bfloat16(), angles.detach(), True))


def test_compiles_into_one_graph(generator):
    x, angles = torch.randn(2, 12, generator=generator), some_angles(generator, 2, 12).requires_grad_()
    compiled = torch.compile(lambda a: butterfly(x, a).square() * 2, fullgraph=True, backend="aot_eager")
    y = compiled(angles)
    torch.testing.assert_close(y, butterfly(x, angles).square() * 2)
    y.sum().backward()
    torch.testing.assert_close(angles.grad, torch.zeros(2, 6), rtol=0, atol=1e-4)  # length is kept
