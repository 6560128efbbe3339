"""The merge of partial attentions equals attention over all keys, in any order, with parts that saw nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, explain
from tersor.kernels.merge_attention import merge_attention


def attention(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def some_parts(generator, parts, *shape, dtype=torch.float32, lse_dtype=torch.float32):
    outputs = torch.randn(parts, *shape, generator=generator).to(dtype)
    return outputs, torch.randn(parts, *shape[:-1], generator=generator).mul(5).to(lse_dtype)


def merged_in_double(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        return merge_attention(outputs.double(), lse.double())


@pytest.mark.parametrize("cuts", [[12], [5, 7], [1, 0, 11], [3, 3, 3, 3]], ids=str)
def test_parts_of_the_keys_merge_into_attention_over_all(body, generator, cuts):
    logits, value = torch.randn(3, 5, 12, generator=generator), torch.randn(3, 12, 6, generator=generator)
    output, lse = zip(*(attention(a, b) for a, b in zip(logits.split(cuts, -1), value.split(cuts, -2))))
    expected, expected_lse = attention(logits.double(), value.double())
    output, lse = merge_attention(torch.stack(output), torch.stack(lse))
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-6)


def test_merge_is_associative_and_commutative(body, generator):
    outputs, lse = some_parts(generator, 3, 4, 7)
    left = merge_attention(outputs[:2], lse[:2])
    one_by_one = merge_attention(torch.stack([left[0], outputs[2]]), torch.stack([left[1], lse[2]]))
    for order in ([0, 1, 2], [2, 0, 1]):
        for merged, expected in zip(merge_attention(outputs[order], lse[order]), one_by_one):
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 100), (3, 1), (2, 3, 5, 16)], ids=str)
def test_rounding_is_the_last_step(body, generator, shape, dtype):
    outputs, lse = some_parts(generator, 3, *shape, dtype=dtype)
    output, total = merge_attention(outputs, lse)
    expected, expected_lse = merged_in_double(outputs, lse)
    assert (output.dtype, total.dtype) == (dtype, torch.float32)
    # one rounding, of numbers below 4; the interpreter cuts bfloat16 off
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6}[dtype] * (2 if body == "gpu" else 1)
    torch.testing.assert_close(output.double(), expected, rtol=unit, atol=1e-6)
    torch.testing.assert_close(total.double(), expected_lse, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(parts=st.integers(1, 5), rows=st.integers(0, 4), head_dim=st.integers(0, 40), seed=st.integers(0, 1000))
def test_any_shape(parts, rows, head_dim, seed):
    outputs, lse = some_parts(torch.Generator().manual_seed(seed), parts, rows, head_dim)
    for merged, expected in zip(merge_attention(outputs, lse), merged_in_double(outputs, lse)):
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_part_without_keys_is_ignored_whatever_it_holds(body, generator):
    outputs, lse = some_parts(generator, 3, 2, 5)
    clean = merge_attention(outputs[:2], lse[:2])
    outputs[2], lse[2] = float("nan"), -float("inf")
    for merged, expected in zip(merge_attention(outputs, lse), clean):
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_no_keys_at_all_give_zero(body):
    for parts in (0, 1, 2):
        output, lse = merge_attention(torch.full((parts, 3, 4), torch.nan), torch.full((parts, 3), -torch.inf))
        assert torch.equal(output, torch.zeros(3, 4))
        assert torch.equal(lse, torch.full((3,), -torch.inf))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_propagates(body, generator):
    outputs, lse = some_parts(generator, 3, 4, 5)
    clean = merge_attention(outputs, lse)
    outputs[1, 0, 2] = lse[0, 1] = lse[1, 2] = float("nan")
    lse[2, 2] = lse[0, 2] = -float("inf")
    output, total = merge_attention(outputs, lse)
    assert output.isnan().sum(-1).tolist() == [1, 5, 5, 0]
    assert total.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(output[3], clean[0][3], rtol=1e-6, atol=1e-6)


def test_large_and_far_logits_do_not_overflow(body, generator):
    outputs, lse = some_parts(generator, 2, 3, 4)
    lse = lse + torch.tensor([[1e4], [3e4]])
    output, total = merge_attention(outputs, lse)
    torch.testing.assert_close(output, outputs[1])
    torch.testing.assert_close(total, lse[1])


def test_strided_inputs(body, generator):
    outputs, lse = some_parts(generator, 3, 4, 6)
    strided = merge_attention(outputs.mT.contiguous().mT, lse.T.contiguous().T)
    for merged, expected in zip(strided, merge_attention(outputs, lse)):
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    outputs, lse = some_parts(generator, 2, 3, 37)
    for merged, expected in zip(merge_attention(guarded(outputs), guarded(lse)), merge_attention(outputs, lse)):
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_gradient(generator):
    outputs, lse = some_parts(generator, 3, 2, 4, dtype=torch.float64, lse_dtype=torch.float64)
    assert torch.autograd.gradcheck(merge_attention, (outputs.requires_grad_(), lse.requires_grad_()))


def test_gradient_of_an_empty_part_is_zero(body, generator):
    outputs, lse = some_parts(generator, 2, 3, 4)
    lse[1] = -float("inf")
    outputs.requires_grad_()
    lse.requires_grad_()
    output, total = merge_attention(outputs, lse)
    (output.sum() + total.sum()).backward()
    assert torch.equal(outputs.grad, torch.stack([torch.ones(3, 4), torch.zeros(3, 4)]))
    assert torch.equal(lse.grad, torch.stack([torch.ones(3), torch.zeros(3)]))


def test_bad_arguments_are_named(generator):
    outputs, lse = some_parts(generator, 2, 3, 4)
    with pytest.raises(TypeError, match="outputs must be float16, .* got torch.int64"):
        merge_attention(outputs.long(), lse)
    with pytest.raises(TypeError, match="lse must be float16, .* got torch.int64"):
        merge_attention(outputs, lse.long())
    with pytest.raises(ValueError, match="lse is on meta, but outputs is on cpu"):
        merge_attention(outputs, lse.to("meta"))
    with pytest.raises(ValueError, match=r"lse \(parts, ...\), got \(2, 3, 4\) and \(3, 2\)"):
        merge_attention(outputs, lse.T)


def test_double_precision_is_the_references(generator):
    assert explain(merge_attention, *some_parts(generator, 2, 3, 4, dtype=torch.float64)).body == "reference"


def test_registration_is_sound(generator):
    outputs, lse = some_parts(generator, 3, 2, 4)
    torch.library.opcheck(torch.ops.tersor.merge_attention.default, (outputs.requires_grad_(), lse.requires_grad_()))
    torch.library.opcheck(torch.ops.tersor.merge_attention.default, some_parts(generator, 2, 5, dtype=torch.bfloat16))


def test_compiles_into_one_graph(generator):
    outputs, lse = some_parts(generator, 3, 2, 4)
    compiled = torch.compile(lambda *x: merge_attention(*x)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs, lse), merge_attention(outputs, lse)[0] * 2)
