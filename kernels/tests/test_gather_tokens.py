"""Tokens picked from a sequence: exactly the ones asked for, of any dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend
from tersor.kernels.gather_tokens import gather_tokens


def some(generator, batch, tokens, k, *dims):
    x = torch.randn(batch, tokens, *dims, generator=generator)
    return x, torch.randint(tokens, (batch, k), generator=generator)


@pytest.mark.parametrize("dims", [(), (1,), (7,), (2, 3), (130,)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_each_token_is_the_one_asked_for(body, generator, dims, index_dtype):
    x, index = some(generator, 3, 11, 5, *dims)
    y = gather_tokens(x, index.to(index_dtype))
    assert torch.equal(y, torch.stack([x[b][index[b]] for b in range(3)]))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 50), st.integers(1, 9), st.integers(0, 1000))
def test_any_shape(batch, tokens, k, dim, seed):
    x, index = some(torch.Generator().manual_seed(seed), batch, tokens, k, dim)
    with backend("reference"):
        expected = gather_tokens(x, index)
    assert torch.equal(gather_tokens(x, index), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.int64, torch.float64, torch.complex128],
    ids=str,
)
def test_any_dtype(body, generator, dtype):
    x, index = some(generator, 2, 6, 4, 3)
    x = x.gt(0) if dtype == torch.bool else x.mul(50).abs().to(dtype)
    y = gather_tokens(x, index)
    assert y.dtype == dtype
    assert torch.equal(y, x[torch.arange(2)[:, None], index])


def test_strided_inputs(body, generator):
    x, index = some(generator, 3, 11, 4, 6)
    for view in (x[:, 1:, ::2], x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :, :1].expand(-1, -1, 5)):
        assert torch.equal(gather_tokens(view, index % 10), gather_tokens(view.contiguous(), index % 10))
    strided = index.T.contiguous().T
    assert torch.equal(gather_tokens(x, strided), gather_tokens(x, index))


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    x, index = some(generator, 3, 11, 5, 7)
    assert torch.equal(gather_tokens(guarded(x), guarded(index)), gather_tokens(x, index))


@pytest.mark.parametrize(
    ("x", "index"), [((0, 4, 3), (0, 2)), ((2, 4, 3), (2, 0)), ((2, 4, 0), (2, 3)), ((2, 0, 3), (2, 0))], ids=str
)
def test_empty_tensors(body, x, index):
    y = gather_tokens(torch.ones(x), torch.zeros(index, dtype=torch.long))
    assert y.shape == (*index, 3 if x[2] else 0)


def test_index_out_of_range_is_named(body):
    x = torch.ones(2, 4, 3)
    with pytest.raises(IndexError, match="index must be 0 to 3 for 4 tokens, but it holds 0 to 4"):
        gather_tokens(x, torch.tensor([[0, 1], [4, 0]]))
    with pytest.raises(IndexError, match="but it holds -1 to 1"):
        gather_tokens(x, torch.tensor([[0, 1], [-1, 0]]))


def test_bad_arguments_are_named():
    x, index = torch.ones(2, 4, 3), torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="index must be int64 or int32, got torch.float32"):
        gather_tokens(x, index.float())
    with pytest.raises(ValueError, match="index is on meta, but x is on cpu"):
        gather_tokens(x, index.to("meta"))
    for wrong in (index[:1], index[0], index[..., None]):
        with pytest.raises(ValueError, match=r"gather_tokens: x must be \(batch, tokens, ...\) and index \(batch, k\)"):
            gather_tokens(x, wrong)


def test_gradient_is_summed_over_repetitions(body):
    x = torch.zeros(1, 3, 2, requires_grad=True)
    gather_tokens(x, torch.tensor([[2, 0, 2]])).backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
    assert torch.equal(x.grad, torch.tensor([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]]))


def test_gradients_of_both_orders(generator):
    x, index = some(generator, 2, 4, 6, 3)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(gather_tokens, (x, index))
    assert torch.autograd.gradgradcheck(gather_tokens, (x, index))


def test_gradient_of_half_precision_is_summed_in_float32():
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_tokens(x, torch.zeros(1, 1000, dtype=torch.long)).sum().backward()
    assert x.grad.item() == 1000  # bfloat16 would stop at 256


def test_registration_is_sound(generator):
    op = torch.ops.tersor.gather_tokens.default
    x, index = some(generator, 2, 5, 3, 4)
    torch.library.opcheck(op, (x.requires_grad_(), index))
    torch.library.opcheck(op, (torch.arange(10).view(2, 5), index.int()))
    torch.library.opcheck(op, (torch.arange(10).view(2, 5), index.mT.contiguous().mT))


def test_compiles_into_one_graph(generator):
    x, index = some(generator, 2, 5, 3, 4)
    x.requires_grad_()
    compiled = torch.compile(lambda x: gather_tokens(x * 2, index).square(), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, gather_tokens(x * 2, index).square())
    y.sum().backward()
    count = torch.zeros(2, 5).scatter_add(1, index, torch.ones(2, 3))
    torch.testing.assert_close(x.grad, 8 * x.detach() * count[..., None])
