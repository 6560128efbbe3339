"""Tokens averaged into fewer: the weighted mean, exact where nothing is averaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, explain
from tersor.kernels.merge_tokens import merge_tokens

ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def some(generator, batch, tokens, num_tokens, *dims):
    x = torch.randn(batch, tokens, *dims, generator=generator)
    size = torch.rand(batch, tokens, generator=generator).add(0.1)
    return x, size, torch.randint(-1, num_tokens, (batch, tokens), generator=generator), num_tokens


def mean(x, size, place, num_tokens):
    """By its definition, with a matrix of shares in float64."""
    weight = size.double()[:, None] * (place[:, None] == torch.arange(num_tokens)[:, None])
    total = weight.sum(-1)
    merged = torch.einsum("bji,bi...->bj...", weight, x.double())
    return merged / total.where(total != 0, 1).view(*total.shape, *(1,) * (x.dim() - 2)), total


def assert_is_mean(args, unit):
    merged, total = merge_tokens(*args)
    assert merged.dtype == args[0].dtype
    expected, sums = mean(*args)
    torch.testing.assert_close(merged.double(), expected, rtol=unit, atol=4 * unit)
    torch.testing.assert_close(total.double(), sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [(), (1,), (7,), (2, 3), (130,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_weighted_mean(body, generator, dims, dtype):
    x, *rest = some(generator, 2, 11, 5, *dims)
    assert_is_mean((x.to(dtype), *rest), ROUNDING[dtype])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 30), st.integers(1, 9), st.integers(0, 1000))
def test_any_shape(batch, tokens, num_tokens, dim, seed):
    args = some(torch.Generator().manual_seed(seed), batch, tokens, num_tokens, dim)
    assert_is_mean(args, 2e-6)
    with backend("reference"):
        assert_is_mean(args, 2e-6)


def test_large_enough_for_several_threads(generator):
    assert_is_mean(some(generator, 2, 300, 100, 130), 2e-6)


def test_pairs_become_the_mean_by_size(body):
    x, size = torch.tensor([[[1.0], [5.0], [7.0]]]), torch.tensor([[1.0, 3.0, 1.0]])
    merged, total = merge_tokens(x, size, torch.tensor([[0, 0, 1]]), 2)
    assert merged.flatten().tolist() == [4, 7]
    assert total.tolist() == [[4, 1]]


def test_what_stays_alone_and_copies_are_exact(body, generator):
    x = torch.randn(1, 6, 40, generator=generator)
    x[0, 3] = x[0, 5] = x[0, 1]
    x[0, 0, 0] = float("inf")
    merged, _ = merge_tokens(x, torch.tensor([[3.0, 0.1, 0.7, 0.3, 7.0, 1.3]]), torch.tensor([[2, 1, 0, 1, 3, 1]]), 4)
    assert torch.equal(merged, x[:, [2, 1, 0, 4]])


def test_places_without_weight_are_zero(body):
    x, size = torch.full((1, 3, 2), float("nan")), torch.tensor([[0.0, 1.0, 2.0]])
    merged, total = merge_tokens(x, size, torch.tensor([[1, -1, 2]], dtype=torch.int32), 4)
    assert torch.equal(merged[0, [0, 1, 3]], torch.zeros(3, 2))
    assert merged[0, 2].isnan().all()
    assert total.tolist() == [[0, 0, 2, 0]]


def test_double_precision(generator):
    x, size, place, n = some(generator, 2, 9, 4, 3)
    for args in ((x.double(), size.double(), place, n), (x.double(), size, place, n), (x, size.double(), place, n)):
        assert_is_mean(args, ROUNDING[args[0].dtype])
        assert merge_tokens(*args)[1].dtype == torch.float64
        assert explain(merge_tokens, *args).body == "cpu"


def test_strided_inputs(body, generator):
    x, size, place, n = some(generator, 3, 10, 4, 6)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2), size.T.contiguous().T, place.T.contiguous().T)
    for a, b in zip(merge_tokens(*strided, n), merge_tokens(x, size, place, n)):
        assert torch.equal(a, b)


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    x, size, place, n = some(generator, 2, 9, 4, 7)
    merged, total = merge_tokens(guarded(x), guarded(size), guarded(place), n)
    expected, sums = merge_tokens(x, size, place, n)
    assert torch.equal(merged, expected)
    assert torch.equal(total, sums)


@pytest.mark.parametrize(
    ("shape", "num_tokens"), [((0, 4, 3), 2), ((2, 4, 0), 2), ((2, 0, 3), 2), ((2, 4, 3), 0)], ids=str
)
def test_empty_tensors(body, shape, num_tokens):
    x = torch.ones(shape, requires_grad=True)
    size, place = torch.ones(shape[:2], requires_grad=True), torch.full(shape[:2], -1 if num_tokens == 0 else 1)
    merged, total = merge_tokens(x, size, place, num_tokens)
    assert merged.shape == (shape[0], num_tokens, shape[2])
    assert total.shape == (shape[0], num_tokens)
    assert not merged.isnan().any()
    merged.sum().backward()
    assert x.grad.shape == shape
    assert size.grad.shape == shape[:2]


def test_place_out_of_range_is_named(body):
    x, size = torch.ones(1, 3, 2), torch.ones(1, 3)
    match = r"place must be -1 \(dropped\) to num_tokens - 1 = 1, but it holds 0 to 2"
    with pytest.raises(IndexError, match=match):
        merge_tokens(x, size, torch.tensor([[0, 1, 2]]), 2)
    with pytest.raises(IndexError, match="it holds -2 to 1"):
        merge_tokens(x, size, torch.tensor([[0, 1, -2]]), 2)


def test_bad_arguments_are_named(generator):
    x, size, place, n = some(generator, 2, 9, 4, 7)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64, got torch.int64"):
        merge_tokens(x.long(), size, place, n)
    with pytest.raises(TypeError, match="size must be float16, bfloat16, float32 or float64, got torch.int64"):
        merge_tokens(x, size.long(), place, n)
    with pytest.raises(TypeError, match="place must be int64 or int32, got torch.bool"):
        merge_tokens(x, size, place > 0, n)
    with pytest.raises(ValueError, match="place is on meta, but x is on cpu"):
        merge_tokens(x, size, place.to("meta"), n)
    with pytest.raises(ValueError, match=r"size must be \(batch, tokens\) = \(2, 9\), got \(2, 8\)"):
        merge_tokens(x, size[:, 1:], place, n)
    with pytest.raises(ValueError, match=r"x must be \(batch, tokens, ...\), got \(9,\)"):
        merge_tokens(x[0, :, 0], size, place, n)
    with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
        merge_tokens(x, size, place, -1)


def test_gradients_of_both_orders(generator):
    x, size, place, n = some(generator, 2, 6, 3, 2)
    place[0, 0] = -1
    x, size = x.double().requires_grad_(), size.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, size: merge_tokens(x, size, place, n), (x, size))
    assert torch.autograd.gradgradcheck(lambda x, size: merge_tokens(x, size, place, n), (x, size))


def test_gradient_is_the_same_from_every_body(body, generator):
    x, size, place, n = some(generator, 2, 9, 4, 7)
    x.requires_grad_(), size.requires_grad_()
    upstream = torch.randn(2, 4, 7, generator=generator)
    merge_tokens(x, size, place, n)[0].backward(upstream)
    x64, size64 = (t.detach().double().requires_grad_() for t in (x, size))
    mean(x64, size64, place, n)[0].backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(size.grad.double(), size64.grad, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_sizes_does_not_come_from_a_rounded_mean(body, generator):
    """Far from zero bfloat16 rounds a mean by as much as tokens differ."""
    x, size, place, n = some(generator, 2, 9, 4, 7)
    x = (20 + x).bfloat16()
    size.requires_grad_()
    upstream = torch.randn(2, 4, 7, generator=generator).bfloat16()
    merge_tokens(x, size, place, n)[0].backward(upstream)
    size64 = size.detach().double().requires_grad_()
    mean(x.double(), size64, place, n)[0].backward(upstream.double())
    torch.testing.assert_close(size.grad.double(), size64.grad, rtol=1e-3, atol=1e-3)


def test_registration_is_sound(generator):
    x, size, place, n = some(generator, 2, 6, 3, 2)
    op = torch.ops.tersor.merge_tokens.default
    torch.library.opcheck(op, (x.requires_grad_(), size.requires_grad_(), place, n))
    torch.library.opcheck(op, (x.detach().bfloat16(), size.detach(), place.int(), n))


def test_compiles_into_one_graph(generator):
    x, size, place, n = some(generator, 2, 6, 3, 2)
    compiled = torch.compile(lambda x: merge_tokens(x * 2, size, place, n)[0], fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, merge_tokens(x * 2, size, place, n)[0])
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
