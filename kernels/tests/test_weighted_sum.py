"""Weighted sums of features: one rounding, any broadcasting weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, explain
from tersor.kernels.weighted_sum import weighted_sum

ROUNDING = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def some(generator, weights, history, dtype=torch.float32):
    return torch.randn(weights, generator=generator), list(torch.randn(history, generator=generator).to(dtype))


def assert_is_sum(weights, history, unit):
    """Off by at most `unit` times the sum of the terms' magnitudes."""
    y = weighted_sum(weights, history)
    terms = [w * h.double() for w, h in zip(weights.double(), history)]
    assert y.dtype == history[0].dtype
    assert y.shape == history[0].shape
    assert ((y.double() - sum(terms)).abs() <= unit * sum(t.abs() for t in terms)).all()


def unit(body, dtype):
    # Triton's interpreter cuts bfloat16 off instead of rounding
    return ROUNDING[dtype] * (2 if body == "gpu" and dtype == torch.bfloat16 else 1)


def served(body, dtype):
    if body == "cpu" and dtype == torch.float16:
        pytest.skip("the reference's")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "weights",
    [(3,), (3, 1), (3, 5), (3, 4, 1), (3, 4, 5), (3, 2, 1, 1), (3, 2, 4, 1), (3, 2, 1, 5), (3, 1, 4, 1), (3, 2, 4, 5)],
    ids=str,
)
def test_weights_broadcast(body, generator, weights, dtype):
    served(body, dtype)
    assert_is_sum(*some(generator, weights, (3, 2, 4, 5), dtype), unit(body, dtype))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.sampled_from([2, 3]), st.lists(st.integers(1, 70), max_size=3), st.booleans(), st.integers(0, 1000))
def test_any_shape(k, shape, per_sample, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (k, shape[0], *(1,) * (len(shape) - 1)) if per_sample and shape else (k,)
    for dtype in (torch.float32, torch.bfloat16):
        assert_is_sum(*some(generator, weights, (k, *shape), dtype), ROUNDING[dtype])


@pytest.mark.parametrize("weights", [(3,), (3, 40, 1), (3, 5001)], ids=str)
def test_large_enough_for_several_threads(generator, weights):
    assert_is_sum(*some(generator, weights, (3, 40, 5001)), ROUNDING[torch.float32])


def test_bfloat16_is_rounded_to_the_nearest_even(generator):
    x = torch.randn(4000, generator=generator)
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0, 3.4e38, float("nan")])
    terms = [x.bfloat16(), (x - x.bfloat16().float()).bfloat16()]
    with backend("reference"):
        expected = weighted_sum([1.0, 1.0], terms)
    y = weighted_sum([1.0, 1.0], terms)
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


def test_lists_tensors_and_numbers_are_the_same(body, generator):
    weights, history = some(generator, (3,), (3, 2, 7))
    y = weighted_sum(weights, history)
    assert torch.equal(weighted_sum(weights.tolist(), history), y)
    assert torch.equal(weighted_sum(weights, torch.stack(history)), y)
    assert torch.equal(weighted_sum([1.0], history[:1]), history[0])


def test_sums_are_kept_in_float32(body):
    big, small = torch.full((4,), 256.0, dtype=torch.bfloat16), torch.full((4,), 1.0, dtype=torch.bfloat16)
    assert torch.equal(weighted_sum([1.0, 1.0, -1.0], [big, small, big]), small)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_and_infinity_propagate(body):
    history = torch.tensor([[float("nan"), float("inf"), 1.0], [1.0, 1.0, 1.0]])
    y = weighted_sum([0.0, 1.0], history)
    assert y.isnan().tolist() == [True, True, False]
    assert weighted_sum([2.0, 1.0], history)[1] == float("inf")


def test_strided_inputs(body, generator):
    weights, history = some(generator, (3, 4, 1), (3, 4, 6))
    strided = [feature.T.contiguous().T for feature in history]
    assert torch.equal(
        weighted_sum(weights.transpose(0, 1).contiguous().transpose(0, 1), strided), weighted_sum(weights, history)
    )


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    for shape in ((3,), (3, 70), (3, 5, 1)):
        weights, history = some(generator, shape, (3, 5, 70))
        y = weighted_sum(guarded(weights), [guarded(feature) for feature in history])
        assert torch.equal(y, weighted_sum(weights, history))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()], ids=str)
def test_empty_tensors_and_scalars(body, shape):
    assert torch.equal(weighted_sum([1.0, 2.0], torch.ones(2, *shape)), torch.full(shape, 3.0))


def test_other_dtypes_are_the_references(generator):
    weights, history = some(generator, (2,), (2, 9), torch.float64)
    assert_is_sum(weights.double(), history, ROUNDING[torch.float64])
    assert explain(weighted_sum, weights, history).declined["cpu"] == "torch.float64"


def test_numbers_keep_their_precision_for_float64():
    assert weighted_sum([1 / 3, 0.0], torch.ones(2, 1, dtype=torch.float64)).item() == 1 / 3


def test_bad_arguments_are_named(generator):
    weights, history = some(generator, (3,), (3, 2, 4))
    with pytest.raises(ValueError, match="history is empty"):
        weighted_sum([], [])
    with pytest.raises(TypeError, match=r"history\[0\] must be float16, bfloat16, float32 or float64, got torch.int64"):
        weighted_sum(weights, [feature.long() for feature in history])
    with pytest.raises(TypeError, match=r"weights must be floating point, got torch.int64; use weights.float\(\)"):
        weighted_sum(weights.long(), history)
    with pytest.raises(ValueError, match=r"weights are on meta, but history\[0\] is on cpu"):
        weighted_sum(weights.to("meta"), history)
    for wrong in (history[1].double(), history[1][:1], history[1].to("meta")):
        with pytest.raises(ValueError, match=r"history\[1\] is .*, but history\[0\] is \(2, 4\), torch.float32 on cpu"):
            weighted_sum(weights, [history[0], wrong, history[2]])
    with pytest.raises(ValueError, match=r"history holds 3 features, so weights must be \(3, ...\), got \(2,\)"):
        weighted_sum(weights[:2], history)
    for shape in ((3, 3), (3, 1, 1, 1), (3, 2)):
        with pytest.raises(ValueError, match=r"does not broadcast to features of shape \(2, 4\); one per sample"):
            weighted_sum(torch.ones(shape), history)


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 3, 1)], ids=str)
def test_gradients_of_both_orders(generator, shape):
    weights, history = some(generator, shape, (2, 3, 4), torch.float64)
    inputs = (weights.double().requires_grad_(), *(feature.requires_grad_() for feature in history))
    assert torch.autograd.gradcheck(lambda w, *h: weighted_sum(w, h), inputs)
    assert torch.autograd.gradgradcheck(lambda w, *h: weighted_sum(w, h), inputs)


def test_gradient_from_every_body(body, generator):
    weights, history = some(generator, (2,), (2, 3, 4))
    weights.requires_grad_(), history[1].requires_grad_()
    weighted_sum(weights, history).sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([feature.detach().sum() for feature in history]))
    torch.testing.assert_close(history[1].grad, weights[1].detach().expand(3, 4))


def test_registration_is_sound(generator):
    weights, history = some(generator, (2, 1, 4), (2, 3, 4))
    op = torch.ops.tersor.weighted_sum.default
    torch.library.opcheck(op, (weights.requires_grad_(), [feature.requires_grad_() for feature in history]))
    torch.library.opcheck(op, (torch.ones(2), [torch.ones(5).bfloat16()] * 2))


def test_compiles_into_one_graph(generator):
    _, history = some(generator, (2,), (2, 3, 4))
    compiled = torch.compile(lambda h: weighted_sum([2.0, -1.0], h) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(history), 2 * history[0] - history[1] + 1)
