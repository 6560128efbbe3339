"""Products with compressed weights: every body agrees with float64 on ragged shapes, and no weight loses a bit."""

import importlib.util
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, explain
from tersor.kernels.compressed_linear import compressed_linear, compressed_weight

# (rows of x, out, in): decoding, batches, prefill; `in` a multiple of 64 or not
SHAPES = [(1, 40, 256), (5, 33, 128), (20, 17, 64), (1, 7, 100), (3, 2, 65), (2, 5, 1), (12, 3, 191)]


def some_weight(generator, out: int, n: int) -> Tensor:
    """Normal, with an outlier in each tier and a row scaled down to subnormals."""
    weight = 0.02 * torch.randn(out, n, generator=generator)
    weight[-1] *= 2.0**-125
    weight.view(-1)[:: max(1, out * n // 7)] *= 2.0**40
    return weight.bfloat16()


def assert_close(y: Tensor, x: Tensor, weight: Tensor, unit: float) -> None:
    """Each sum is off by at most `unit` times the sum of its terms' magnitudes."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(weight))
    x, W = x.double(), weight.double()
    # 2^-126: subnormal results may be flushed
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ W.abs().T) + 2.0**-126).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_to_float32(body, generator, shape):
    rows, out, n = shape
    weight, x = some_weight(generator, out, n), torch.randn(rows, n, generator=generator)
    assert_close(compressed_linear(x, *compressed_in_any_body(weight)), x, weight, 2e-6)


def compressed_in_any_body(weight: Tensor):
    """The encoder has no GPU body."""
    with backend("reference"):
        return compressed_weight(weight)


def test_unit_vectors_bring_the_weights_back_bit_for_bit(body, generator):
    weight = some_weight(generator, 9, 70)
    weight[:, 3] = torch.tensor([0.0, -0.0, 3e38, -1e-30, 2.0**-120, 1.0, -1.0, 0.1, -7.0])
    y = compressed_linear(torch.eye(70), *compressed_in_any_body(weight))
    normal = weight.float().abs() >= 2.0**-126  # a unit may flush what is below to 0
    assert torch.equal(y.T[normal], weight.float()[normal])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 128), (12, 17, 100)], ids=str)
def test_half_precision(body, generator, dtype, shape):
    rows, out, n = shape
    weight = (0.02 * torch.randn(out, n, generator=generator)).bfloat16()
    x = torch.randn(rows, n, generator=generator).to(dtype)
    # one rounding at the end; Triton's interpreter cuts bfloat16 off instead
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_close(compressed_linear(x, *compressed_in_any_body(weight)), x, weight, unit)


def test_double_precision_is_the_references(generator):
    weight, x = some_weight(generator, 5, 64), torch.randn(3, 64, dtype=torch.float64, generator=generator)
    compressed = compressed_weight(weight)
    assert explain(compressed_linear, x, *compressed).declined["cpu"] == "float64"
    assert_close(compressed_linear(x, *compressed), x, weight, 1e-14)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(rows=st.integers(0, 10), out=st.integers(0, 20), n=st.integers(0, 200), seed=st.integers(0, 99))
def test_any_shape(rows, out, n, seed):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, n, generator=g) * torch.randn(out, n, generator=g).mul(9).exp2()).bfloat16()
    x = torch.randn(rows, n, generator=g)
    compressed = compressed_weight(weight)
    assert_close(compressed_linear(x, *compressed), x, weight, 2e-6)


@pytest.fixture
def _several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_several_threads")
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_large_enough_for_several_threads(generator, rows):
    weight, x = some_weight(generator, 1030, 192), torch.randn(rows, 192, generator=generator)
    assert_close(compressed_linear(x, *compressed_weight(weight)), x, weight, 2e-6)


def test_batch_dimensions_and_strides(body, generator):
    weight, x = some_weight(generator, 6, 100), torch.randn(2, 3, 100, generator=generator)
    compressed = compressed_in_any_body(weight)
    assert_close(compressed_linear(x, *compressed), x, weight, 2e-6)
    assert_close(compressed_linear(x[0, 0], *compressed), x[0, 0], weight, 2e-6)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, *compressed)]
    torch.testing.assert_close(compressed_linear(*strided), compressed_linear(x, *compressed))


@pytest.mark.parametrize("shape", [(1, 5, 100), (3, 4, 128), (12, 5, 64)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, shape):
    rows, out, n = shape
    weight, x = some_weight(generator, out, n), torch.randn(rows, n, generator=generator)
    y = compressed_linear(guarded(x), *map(guarded, compressed_in_any_body(weight)))
    assert_close(y, x, weight, 2e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_and_infinity_propagate(body, generator):
    weight, x = torch.randn(5, 64, generator=generator).bfloat16(), torch.randn(3, 64, generator=generator)
    weight[1, 3], weight[2, 4] = float("nan"), float("inf")
    x[2, 9] = float("nan")
    y = compressed_linear(x, *compressed_in_any_body(weight))
    assert y[:, 1].isnan().all()
    assert y[2].isnan().all()
    assert y[:2, 2].isinf().all()
    assert y[:2, [0, 3, 4]].isfinite().all()


def outcome(x: Tensor, compressed: list[Tensor]) -> tuple[int, ...] | str:
    """The shape of the product, or why there is none."""
    try:
        return tuple(compressed_linear(x, *compressed).shape)
    except ValueError as error:
        return str(error)


def test_damage_is_refused_or_harmless(body, generator, guarded):
    weight, x = some_weight(generator, 6, 100), torch.randn(2, 100, generator=generator)
    compressed = compressed_in_any_body(weight)
    refused = 0
    for which in range(1, 5):
        for _ in range(4 if body == "gpu" else 25):
            bad = compressed[which].clone()
            flat = bad.view(-1).view(torch.uint8)
            flat[int(torch.randint(0, len(flat), (), generator=generator))] ^= 1 << int(
                torch.randint(0, 8, (), generator=generator)
            )
            parts = [bad if i == which else part for i, part in enumerate(compressed)]
            answer = outcome(guarded(x), list(map(guarded, parts)))
            refused += answer != (2, 6)
            assert answer == (2, 6) or "the coded data is damaged" in answer
    assert refused


def test_bad_arguments_are_named(generator):
    x, compressed = torch.randn(2, 64, generator=generator), compressed_weight(some_weight(generator, 5, 64))

    def expect(error, match, x=x, **changed):
        with pytest.raises(error, match=match):
            compressed_linear(x, *compressed._replace(**changed))

    expect(TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", x=x.long())
    expect(TypeError, "sign_mantissa must be uint8, got torch.int32", sign_mantissa=compressed.sign_mantissa.int())
    expect(TypeError, "stream must be uint8, got torch.int64", stream=compressed.stream.long())
    expect(TypeError, "offsets must be int64, got torch.int32", offsets=compressed.offsets.int())
    expect(ValueError, r"x must be .* got \(2, 63\) and \(5, 64\)", x=x[:, :63])
    expect(ValueError, r"offsets must be \(out, 2\) = \(5, 2\), got \(4, 2\)", offsets=compressed.offsets[:4])
    expect(ValueError, "sign_mantissa is on meta, but x is on cpu", sign_mantissa=compressed.sign_mantissa.to("meta"))
    expect(ValueError, "stream has 80 bytes instead of 96", stream=compressed.stream[:80])
    with pytest.raises(TypeError, match=r"weight must be \(out, in\) in bfloat16, got \(5, 64\) in torch.float32"):
        compressed_weight(torch.zeros(5, 64))


def test_gradient_of_x(body, generator):
    weight, x = some_weight(generator, 5, 70), torch.randn(3, 70, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 5, generator=generator)
    compressed = compressed_in_any_body(weight)
    with backend("reference" if body == "gpu" else body):
        compressed_linear(x, *compressed).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ weight.double()).float(), rtol=1e-4, atol=1e-6)


def test_registration_is_sound(generator):
    x = torch.randn(3, 70, generator=generator, requires_grad=True)
    compressed = compressed_weight(some_weight(generator, 5, 70))
    torch.library.opcheck(torch.ops.tersor.compressed_linear.default, (x, *compressed))


def test_compiles_into_one_graph(generator):
    weight, x = some_weight(generator, 5, 70), torch.randn(3, 70, generator=generator)
    compressed = compressed_weight(weight)
    compiled = torch.compile(lambda x: compressed_linear(x, *compressed) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), compressed_linear(x, *compressed) * 2)


def test_compressed_weights_are_smaller(generator):
    weight = torch.randn(512, 512, generator=generator).bfloat16()
    assert sum(part.nbytes for part in compressed_weight(weight)) <= 0.73 * weight.nbytes


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_one_token_is_much_faster_than_decoding_first(generator):
    weight, x = some_weight(generator, 1024, 1024), torch.randn(1, 1024, generator=generator)
    compressed = compressed_weight(weight)

    def seconds(body):
        with backend(body):
            start = time.thread_time()
            compressed_linear(x, *compressed)
            return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds("cpu")
        # measured: 50 times; the other work of a shared machine hits both
        assert min(seconds("reference") for _ in range(3)) >= 4 * min(seconds("cpu") for _ in range(5))
    finally:
        torch.set_num_threads(threads)
