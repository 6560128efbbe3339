"""The k largest: exactly k, the lowest index first, NaN above all."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import explain
from tersor.kernels.topk_mask import topk_mask

NAN, INF = float("nan"), float("inf")


def expected(scores: torch.Tensor, k: int) -> list[bool]:
    """By the definition, one row at a time."""
    row = scores.tolist()
    key = functools.cmp_to_key(lambda i, j: order(row[j], row[i]) or i - j)
    taken = sorted(range(len(row)), key=key)[:k]
    return [i in taken for i in range(len(row))]


def order(a: float, b: float) -> int:
    if a != a or b != b:
        return (a != a) - (b != b)
    return (a > b) - (a < b)


def some(generator, rows, n):
    """Scores with many ties."""
    return torch.randn(rows, n, generator=generator).mul(4).round().div(4)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (7, 3), (300, 1), (300, 150), (300, 299)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exactly_the_k_largest(body, generator, n, k, dtype):
    scores = some(generator, 2, n).to(dtype)
    mask = topk_mask(scores, k)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [expected(row, k) for row in scores]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    st.integers(0, 60),
)
def test_any_floats(values, k):
    scores = torch.tensor(values, dtype=torch.float32)
    assert topk_mask(scores, min(k, len(values))).tolist() == expected(scores, min(k, len(values)))


def test_special_values(body):
    scores = torch.tensor([0.0, -0.0, NAN, -INF, INF, -NAN, 0.0, 1e-45, -1e-45, 3e38])
    for k in range(0, len(scores) + 1, 2):
        assert topk_mask(scores, k).tolist() == expected(scores, k)


def test_one_k_per_row(body, generator):
    scores = some(generator, 6, 50).view(2, 3, 50)
    k = torch.tensor([[0, 50, 3], [7, 1, 49]])
    assert torch.equal(topk_mask(scores, k).sum(-1), k)
    for each in (torch.tensor([1, 2, 3]), torch.tensor([[5], [9]], dtype=torch.int32)):
        assert torch.equal(topk_mask(scores, each), topk_mask(scores, each.long().expand(2, 3).contiguous()))


def test_rows_longer_than_a_block(body, generator):
    scores = some(generator, 1, 5000)
    order = scores[0].argsort(descending=True, stable=True)
    for k in (1, 2500):
        assert torch.equal(topk_mask(scores, k)[0].nonzero()[:, 0], order[:k].sort().values)


def test_large_enough_for_several_threads(generator):
    scores = some(generator, 40, 2000)
    assert torch.equal(topk_mask(scores, torch.arange(40)).sum(-1), torch.arange(40))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64], ids=str)
def test_other_dtypes_are_the_references(generator, dtype):
    scores = torch.randint(0, 9, (2, 30), generator=generator).to(dtype)
    assert topk_mask(scores, 11).tolist() == [expected(row, 11) for row in scores]
    assert explain(topk_mask, scores, 11).declined["cpu"] == f"scores are {dtype}"


def test_strided_inputs(body, generator):
    scores = some(generator, 30, 4).T
    assert torch.equal(topk_mask(scores, 7), topk_mask(scores.contiguous(), 7))
    k = torch.tensor([[1, 9], [2, 9], [3, 9], [4, 9]])[:, 0]
    assert torch.equal(topk_mask(scores, k), topk_mask(scores, k.contiguous()))


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    scores, k = some(generator, 3, 70), torch.tensor([1, 40, 69])
    assert torch.equal(topk_mask(guarded(scores), guarded(k)), topk_mask(scores, k))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)], ids=str)
def test_empty_tensors(body, shape):
    assert topk_mask(torch.ones(shape), 0).shape == shape


def test_k_out_of_range_is_named(body):
    for k in (-1, 5):
        for each in (k, torch.tensor([1, k])):
            with pytest.raises(ValueError, match=f"topk_mask: k must be 0 to n = 4, got {k}"):
                topk_mask(torch.ones(2, 4), each)


def test_bad_arguments_are_named():
    scores = torch.ones(2, 4)
    with pytest.raises(TypeError, match="scores must be real numbers, got torch.complex64"):
        topk_mask(scores.to(torch.complex64), 1)
    with pytest.raises(TypeError, match="k must be int64 or int32, got torch.float32"):
        topk_mask(scores, torch.tensor(1.0))
    with pytest.raises(ValueError, match="scores must have at least one dimension"):
        topk_mask(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match=r"one per row of scores, \(2,\), got shape \(3,\)"):
        topk_mask(scores, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="k is on meta, but scores are on cpu"):
        topk_mask(scores, torch.ones(2, dtype=torch.long, device="meta"))


def test_mask_has_no_gradient(body):
    assert not topk_mask(torch.ones(2, 4, requires_grad=True), 1).requires_grad


def test_registration_is_sound(generator):
    op = torch.ops.tersor.topk_mask.default
    torch.library.opcheck(op, (some(generator, 3, 10), torch.tensor([1, 2, 3])))
    torch.library.opcheck(op, (some(generator, 3, 10), torch.tensor(4)))


def test_compiles_into_one_graph(generator):
    scores = some(generator, 3, 10)
    compiled = torch.compile(lambda s: topk_mask(s * 2, 4) & (s > 0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), topk_mask(scores, 4) & (scores > 0))
