"""Products with packed weights: every body agrees with float64, on ragged shapes, and reads nothing else."""

import importlib.util
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tersor.kernels import backend, dequant_matmul, explain, pack_bits

# (rows of x, out, in, group_size): decoding, batches, prefill; ragged, whole rows and single channels as groups
SHAPES = [
    (1, 40, 256, 32),
    (5, 100, 256, 128),
    (20, 33, 128, 128),
    (1, 7, 96, 16),
    (3, 9, 100, 20),
    (1, 3, 6, 3),
    (2, 5, 7, 1),
]


class Problem(NamedTuple):
    x: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int


def problem(generator, bits, rows, out, n, group_size, dtype=torch.float32, scale_dtype=torch.float32) -> Problem:
    codes = torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=generator)
    scale = torch.rand(out, n // group_size, generator=generator).add(0.1).to(scale_dtype)
    zero_point = torch.rand(out, n // group_size, generator=generator).mul(2**bits).to(scale_dtype)
    x = torch.randn(rows, n, generator=generator).to(dtype)
    return Problem(x, pack_bits(codes, bits), scale, zero_point, bits, group_size)


def weight(p: Problem) -> Tensor:
    """The weights in float64."""
    with backend("reference"):
        eye = torch.eye(p.x.shape[-1], dtype=torch.float64)
        return dequant_matmul(eye, *p[1:]).T


def assert_close(y: Tensor, p: Problem, unit: float) -> None:
    """Each sum is off by at most `unit` times the sum of its terms' magnitudes."""
    W, x = weight(p), p.x.double()
    assert y.dtype == p.x.dtype
    assert y.shape == (*p.x.shape[:-1], len(W))
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ W.abs().T)).all()


def test_weight_is_codes_minus_zero_point_times_scale(body):
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale, zero_point = torch.tensor([[1.0, 10.0], [2.0, 3.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    expected = torch.tensor([[-1.0, 0.0, 0.0, 10.0], [6.0, 4.0, 1.5, -1.5]])
    assert torch.equal(dequant_matmul(torch.eye(4), pack_bits(codes, 2), scale, zero_point, 2, 2), expected.T)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_to_float32(body, generator, bits, shape):
    if body == "gpu" and bits not in (4, 8) and shape[2] > 100:
        pytest.skip("the interpreter is slow")
    p = problem(generator, bits, *shape)
    assert_close(dequant_matmul(*p), p, 2e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 40, 64, 32), (5, 9, 100, 20), (12, 33, 128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(body, generator, bits, shape, dtype):
    p = problem(generator, bits, *shape, dtype=dtype, scale_dtype=dtype)
    # one rounding at the end; the GPU body also rounds the weights, and its interpreter cuts bfloat16 off instead
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_close(dequant_matmul(*p), p, rounding * (1 if body != "gpu" else 4 if dtype == torch.bfloat16 else 2))


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_any_floating_scale(body, generator, scale_dtype):
    p = problem(generator, 4, 2, 5, 64, 32, scale_dtype=scale_dtype)
    assert_close(dequant_matmul(*p), p, 2e-6)


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("bits", [3, 4])
def test_large_enough_for_several_threads(generator, rows, bits):
    p = problem(generator, bits, rows, 1030, 256, 64)
    assert_close(dequant_matmul(*p), p, 2e-6)


def test_batch_dimensions(body, generator):
    p = problem(generator, 4, 6, 5, 64, 32)
    expected = dequant_matmul(*p)
    assert torch.equal(dequant_matmul(p.x.view(2, 3, 64), *p[1:]), expected.view(2, 3, 5))
    torch.testing.assert_close(dequant_matmul(p.x[0], *p[1:]), expected[0], rtol=1e-5, atol=1e-5)


def test_strided_inputs(body, generator):
    p = problem(generator, 4, 6, 5, 64, 32)
    strided = (t.T.contiguous().T for t in p[:4])
    torch.testing.assert_close(dequant_matmul(*strided, 4, 32), dequant_matmul(*p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 5, 100, 20), (1, 5, 128, 64), (3, 5, 96, 96), (12, 5, 64, 16)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, bits, shape):
    p = problem(generator, bits, *shape)
    assert_close(dequant_matmul(*(guarded(t) for t in p[:4]), *p[4:]), p, 2e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_and_infinity_propagate(body, generator):
    p = problem(generator, 4, 4, 5, 64, 32)
    clean = dequant_matmul(*p)
    p.x[1, 3] = float("nan")
    p.x[2, 7] = float("inf")
    p.scale[2, 1] = float("nan")
    y = dequant_matmul(*p)
    assert y[1].isnan().all()
    assert y[:, 2].isnan().all()
    finite_weight = weight(p)[:, 7] != 0
    assert not y[2, finite_weight].isfinite().any()
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(y[0, rest], clean[0, rest], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[3, rest], clean[3, rest], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "out", "n"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_tensors(body, generator, rows, out, n):
    y = dequant_matmul(*problem(generator, 4, rows, out, n, 32))
    assert torch.equal(y, torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p = problem(generator, 4, 2, 5, 64, 32)

    def expect(error, match, **changed):
        with pytest.raises(error, match=match):
            dequant_matmul(*p._replace(**changed))

    expect(TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", x=p.x.long())
    expect(TypeError, "packed must be uint8, got torch.int32", packed=p.packed.int())
    expect(TypeError, r"scale must be floating point, got torch.int64; use scale.float\(\)", scale=p.scale.long())
    expect(TypeError, "zero_point must be floating point, got torch.uint8", zero_point=p.zero_point.byte())
    expect(ValueError, "scale is on meta, but x is on cpu", scale=p.scale.to("meta"))
    expect(ValueError, "bits must be 1 to 8, got 9", bits=9)
    expect(ValueError, r"packed \(out, bytes\), got \(2, 64\) and \(160,\)", packed=p.packed.flatten())
    expect(ValueError, "64 codes of 3 bits take 24 bytes, but packed has 32", bits=3)
    expect(ValueError, "x has in = 63, and 63 codes", x=p.x[:, :63], bits=3)
    expect(ValueError, "group_size = 48 does not divide in = 64", group_size=48)
    expect(ValueError, "group_size = 0 does not divide in = 64", group_size=0)
    expect(ValueError, r"scale must be \(out, in / group_size\) = \(5, 4\), got \(5, 2\)", group_size=16)
    expect(ValueError, r"zero_point must be .* = \(5, 2\), got \(4, 2\)", zero_point=p.zero_point[:4])


def test_double_precision_is_the_references(generator):
    p = problem(generator, 4, 2, 5, 64, 32, dtype=torch.float64)
    assert explain(dequant_matmul, *p).body == "reference"
    assert_close(dequant_matmul(*p), p, 1e-14)
    with backend("cpu"), pytest.raises(NotImplementedError, match="the cpu body is forced, but declines: "):
        dequant_matmul(*p)


def test_gradient_of_x(body, generator):
    p = problem(generator, 4, 3, 5, 64, 32)
    x = p.x.clone().requires_grad_()
    upstream = torch.randn(3, 5, generator=generator)
    dequant_matmul(x, *p[1:]).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ weight(p)).float(), rtol=1e-4, atol=1e-4)


def test_gradient_in_double_precision(generator):
    p = problem(generator, 3, 2, 5, 12, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: dequant_matmul(x, *p[1:]), p.x.requires_grad_())


@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_gradient_of_the_grid_is_refused(generator, name):
    p = problem(generator, 4, 3, 5, 64, 32)
    getattr(p, name).requires_grad_()
    y = dequant_matmul(*p)
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}: detach it"):
        y.sum().backward()


def test_registration_is_sound(generator):
    for shape, dtype in (((3, 5, 64, 32), torch.float32), ((1, 5, 20, 10), torch.bfloat16)):
        p = problem(generator, 4, *shape, dtype=dtype)
        torch.library.opcheck(torch.ops.tersor.dequant_matmul.default, (p.x.requires_grad_(), *p[1:]))


def test_compiles_into_one_graph(generator):
    p = problem(generator, 4, 3, 5, 64, 32)
    compiled = torch.compile(lambda x: dequant_matmul(x, *p[1:]) * 2, fullgraph=True, backend="aot_eager")
    x = p.x.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, dequant_matmul(*p) * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight(p).sum(0).float().expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_decoding_one_token_is_much_faster_than_dequantising(generator):
    p = problem(generator, 4, 1, 1024, 1024, 128)

    def seconds(body):
        with backend(body):
            start = time.thread_time()
            dequant_matmul(*p)
            return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds("cpu")
        # measured: 10 times; the other work of a shared machine hits both
        assert min(seconds("reference") for _ in range(5)) >= 2 * min(seconds("cpu") for _ in range(5))
    finally:
        torch.set_num_threads(threads)
