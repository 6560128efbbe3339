"""The most similar token: the same from every body, ties and NaN as promised, no whole matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, explain
from tersor.kernels.bipartite_match import bipartite_match


def some(generator, batch, n, m, dim, dtype=torch.float32):
    return [torch.randn(batch, tokens, dim, generator=generator).to(dtype) for tokens in (n, m)]


def assert_best(a, b, unit=1e-6):
    """The score is the largest cosine, and the token at the index has it."""
    score, index = bipartite_match(a, b)
    assert score.dtype == torch.promote_types(a.dtype, torch.float32)
    cosine = torch.nn.functional.normalize(a.double(), dim=-1) @ torch.nn.functional.normalize(b.double(), dim=-1).mT
    torch.testing.assert_close(score.double(), cosine.amax(-1), rtol=0, atol=unit)
    torch.testing.assert_close(cosine.gather(2, index[..., None])[..., 0], cosine.amax(-1), rtol=0, atol=2 * unit)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 70, 130, 33), (3, 1, 1, 1), (1, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_largest_cosine(body, generator, shape, dtype):
    assert_best(*some(generator, *shape, dtype))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), st.integers(1, 20), st.integers(0, 1000))
def test_any_shape(batch, n, m, dim, seed):
    assert_best(*some(torch.Generator().manual_seed(seed), batch, n, m, dim))


@pytest.mark.parametrize("shape", [(40, 150, 200, 4), (2, 300, 4000, 4)], ids=str)
def test_many_blocks(generator, shape):
    """More similarities than the CPU body holds at a time, of several samples and of one."""
    assert_best(*some(generator, *shape))


def test_ties_go_to_the_lowest_index(body):
    # signs in 4 dimensions: lengths and products are exact
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    order = torch.tensor([3, 1, 1, 2, 0, 2, 3, 0]).repeat(40)
    score, index = bipartite_match(signs[None], signs[order][None])
    assert index.tolist() == [[4, 1, 3, 0]]
    assert score.tolist() == [[1, 1, 1, 1]]
    score, index = bipartite_match(torch.zeros(1, 2, 4), signs[None])
    assert (score.tolist(), index.tolist()) == ([[0, 0]], [[0, 0]])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_larger_than_every_number(body, generator, bad):
    a, b = some(generator, 3, 5, 150, 8)
    a[0, 2, 1] = bad
    b[1, 140, 3] = b[1, 147, 0] = bad
    a[1, 4, 0] = bad
    score, index = bipartite_match(a, b)
    assert score.isnan().tolist() == [[False, False, True, False, False], [True] * 5, [False] * 5]
    assert index[0, 2] == 0
    assert index[1].tolist() == [140, 140, 140, 140, 0]
    assert_best(a[2:], b[2:])
    torch.testing.assert_close(score[0, :2], bipartite_match(a[:1, :2], b[:1])[0][0], rtol=0, atol=1e-6)


def test_length_does_not_matter(body, generator):
    a, b = some(generator, 1, 6, 9, 5)
    assert_best(a * 1e12, b * 1e-8)


def test_double_precision(generator):
    a, b = some(generator, 2, 5, 7, 3, torch.float64)
    assert_best(a, b, 1e-14)
    assert explain(bipartite_match, a, b).body == "cpu"


def test_strided_inputs(body, generator):
    tokens = torch.randn(2, 12, 6, generator=generator)
    for a, b in ((tokens[:, ::2], tokens[:, 1::2]), (tokens[:, :, ::2], tokens[:, :5, 1::2])):
        for strided, expected in zip(bipartite_match(a, b), bipartite_match(a.contiguous(), b.contiguous())):
            torch.testing.assert_close(strided, expected)


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    a, b = some(generator, 2, 5, 70, 9)
    for inside, expected in zip(bipartite_match(guarded(a), guarded(b)), bipartite_match(a, b)):
        assert torch.equal(inside, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 0, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty_tensors(body, generator, shape):
    score, index = bipartite_match(*some(generator, *shape))
    assert torch.equal(score, torch.zeros(shape[:2]))
    assert torch.equal(index, torch.zeros(shape[:2], dtype=torch.long))


def test_bad_arguments_are_named(generator):
    a, b = some(generator, 2, 5, 7, 3)
    with pytest.raises(TypeError, match="b must be float16, bfloat16, float32 or float64, got torch.int64"):
        bipartite_match(a, b.long())
    with pytest.raises(TypeError, match=r"b is torch.float64, but a is torch.float32; use b.to\(a.dtype\)"):
        bipartite_match(a, b.double())
    with pytest.raises(ValueError, match="b is on meta, but a is on cpu"):
        bipartite_match(a, b.to("meta"))
    for wrong in (b[:1], b[0], b[..., :2]):
        with pytest.raises(ValueError, match=r"a must be \(batch, tokens of A, dim\)"):
            bipartite_match(a, wrong)
    with pytest.raises(ValueError, match="b has no tokens, so those of a have nothing to match"):
        bipartite_match(a, b[:, :0])


def test_gradient_is_refused(generator):
    a, b = some(generator, 2, 5, 7, 3)
    score, index = bipartite_match(a.requires_grad_(), b)
    assert not index.requires_grad
    with pytest.raises(NotImplementedError, match="bipartite_match has no gradient: detach a and b"):
        score.sum().backward()


def test_registration_is_sound(generator):
    torch.library.opcheck(torch.ops.tersor.bipartite_match.default, tuple(some(generator, 2, 5, 7, 3)))


def test_compiles_into_one_graph(generator):
    a, b = some(generator, 2, 5, 7, 3)
    score, index = torch.compile(lambda a: bipartite_match(a * 2, b), fullgraph=True, backend="aot_eager")(a)
    with backend("reference"):
        expected, expected_index = bipartite_match(a, b)
    torch.testing.assert_close(score, expected)
    assert torch.equal(index, expected_index)
