"""Attention of draft trees: every body equals SDPA with the full mask, and each path a tree of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.kernels import backend, explain
from tersor.kernels.tree_attention import ancestor_mask, tree_attention


def some_tree(generator, nodes: int, *batch: int) -> Tensor:
    """Parents of a tree with now and then another root."""
    rows = [torch.randint(-1, max(i, 1), (*batch, 1), generator=generator) for i in range(nodes)]
    return torch.cat([r.clamp(max=i - 1) for i, r in enumerate(rows)], -1) if rows else torch.zeros(*batch, 0).long()


def problem(
    generator, batch=2, num_heads=4, kv_heads=2, cached=30, nodes=7, head_dim=16, dtype=torch.float32, trees=False
):
    keys = (batch, kv_heads, cached + nodes, head_dim)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((batch, num_heads, nodes, head_dim), keys, keys)
    )
    return query, key, value, ancestor_mask(some_tree(generator, nodes, *((batch,) if trees else ())))


def in_double(query, key, value, ancestors, bias=None, scale=None) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        return tree_attention(query.double(), key.double(), value.double(), ancestors, bias, scale)


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], unit: float = 1e-5) -> None:
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double(), b, rtol=unit, atol=unit)


def test_mask_is_the_closure_of_the_parents(generator):
    parents = some_tree(generator, 40, 3)
    mask = ancestor_mask(parents)
    for row, tree in enumerate(parents.tolist()):
        for i, parent in enumerate(tree):
            expected = mask[row, parent].clone() if parent >= 0 else torch.zeros(40, dtype=torch.bool)
            expected[i] = True
            assert torch.equal(mask[row, i], expected)
    chain = ancestor_mask(torch.arange(-1, 16))
    assert torch.equal(chain, torch.ones(17, 17, dtype=torch.bool).tril())
    assert ancestor_mask(torch.zeros(0, dtype=torch.long)).shape == (0, 0)


def test_bad_parents_are_named():
    for parents in ([0], [-1, 1], [-2], [-1, 2, 0]):
        with pytest.raises(ValueError, match="a parent must be -1 or the index of an earlier node"):
            ancestor_mask(torch.tensor(parents))
    with pytest.raises(TypeError, match="parents must be integers"):
        ancestor_mask(torch.zeros(3))


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("shape", [(30, 7, 16), (100, 1, 20), (0, 5, 64), (3, 70, 6), (1, 1, 1)], ids=str)
def test_equals_sdpa_with_the_full_mask(body, generator, shape, trees):
    cached, nodes, head_dim = shape
    query, key, value, ancestors = problem(generator, cached=cached, nodes=nodes, head_dim=head_dim, trees=trees)
    mask = torch.cat([torch.ones(2, nodes, cached, dtype=torch.bool), ancestors.expand(2, nodes, nodes)], -1)
    expected = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask[:, None], enable_gqa=True
    )
    output, lse = tree_attention(query, key, value, ancestors)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), in_double(query, key, value, ancestors)[1], rtol=1e-5, atol=1e-5)


def test_a_path_sees_what_it_would_see_alone(body, generator):
    query, key, value, _ = problem(generator, nodes=6)
    parents = torch.tensor([-1, 0, 0, 1, 2, 3])
    path = [0, 1, 3, 5]
    output, lse = tree_attention(query, key, value, ancestor_mask(parents))
    kept = [*range(30), *(30 + i for i in path)]
    alone = tree_attention(query[:, :, path], key[:, :, kept], value[:, :, kept], ancestor_mask(torch.arange(-1, 3)))
    assert_close((output[:, :, path], lse[:, :, path]), tuple(t.double() for t in alone))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 3)),
    cached=st.integers(0, 60),
    nodes=st.integers(0, 12),
    head_dim=st.integers(1, 20),
    trees=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(sizes, cached, nodes, head_dim, trees, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = sizes
    p = problem(generator, batch, kv_heads * group, kv_heads, cached, nodes, head_dim, trees=trees)
    bias = torch.randn(batch, 1, cached + nodes, generator=generator) if biased else None
    assert_close(tree_attention(*p, bias), in_double(*p, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(body, generator, dtype):
    p = problem(generator, dtype=dtype)
    (output, lse), (expected, expected_lse) = tree_attention(*p), in_double(*p)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    # numbers below 4; a second rounding on the CPU (the cache's part), and in the interpreter, which cuts off
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * (1 if body == "reference" else 2)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=unit)
    torch.testing.assert_close(
        lse.double(), expected_lse, rtol=0, atol=1e-4 if body != "gpu" else unit
    )  # PyTorch's exp of halves


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bias_hides_and_weighs_tokens(body, generator, shape, dtype):
    p = problem(generator, trees=True, dtype=dtype)
    bias = torch.randn(*shape, 37, generator=generator)
    bias[..., :5] = -torch.inf
    assert_close(tree_attention(*p, bias, 0.3), in_double(*p, bias, 0.3), 1e-5 if dtype == torch.float32 else 2**-8)


def test_a_node_that_sees_nothing_has_output_0_and_lse_minus_infinity(body, generator):
    query, key, value, ancestors = problem(generator, trees=True)
    bias = torch.zeros(2, 1, 37)
    bias[1, :, :30] = -torch.inf  # of the second row, only the tree is left,
    ancestors[1, 3] = False  # and for one node nothing
    output, lse = tree_attention(query, key, value, ancestors, bias)
    assert not output[1, :, 3].any()
    assert (lse[1, :, 3] == -torch.inf).all()
    assert_close((output, lse), in_double(query, key, value, ancestors, bias))


def test_long_caches_are_split_and_merged(body, generator):
    p = problem(generator, 1, 2, 1, 700, 5, 32)
    assert_close(tree_attention(*p), in_double(*p))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_propagates_to_those_who_see_it(body, generator):
    query, key, value, _ = problem(generator, nodes=3)
    ancestors = ancestor_mask(torch.tensor([-1, 0, 0]))
    clean = tree_attention(query, key, value, ancestors)
    query[0, 0, 1, 3] = key[1, 1, 4, 0] = float("nan")
    output, lse = tree_attention(query, key, value, ancestors)
    assert output[0, 0, 1].isnan().all()
    assert lse[0, 0, 1].isnan()
    assert output[1, 2:].isnan().all()
    torch.testing.assert_close(output[0, 0, [0, 2]], clean[0][0, 0, [0, 2]])
    torch.testing.assert_close(output[1, :2], clean[0][1, :2])


@pytest.mark.parametrize("num_heads", [2, 4])
def test_views_of_a_longer_buffer(body, generator, num_heads):
    query, key, value, ancestors = problem(generator, num_heads=num_heads)
    buffers = [torch.cat([t, torch.full((2, 2, 20, 16), torch.nan)], 2)[:, :, :37] for t in (key, value)]
    assert_close(tree_attention(query, *buffers, ancestors), in_double(query, key, value, ancestors))
    strided = [t.mT.contiguous().mT for t in (query, key, value)]
    assert_close(tree_attention(*strided, ancestors.mT.contiguous().mT), in_double(query, key, value, ancestors))


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    p = problem(generator, head_dim=20, trees=True)
    bias = torch.randn(1, 2, 37, generator=generator)
    assert_close(tree_attention(*map(guarded, p[:3]), p[3], guarded(bias)), in_double(*p, bias))


def test_empty_tensors(body, generator):
    for shape in ({"batch": 0}, {"nodes": 0}, {"num_heads": 0}):
        p = problem(generator, **shape)
        output, lse = tree_attention(*p)
        assert (output.shape, lse.shape) == (p[0].shape, p[0].shape[:3])


def test_bad_arguments_are_named(generator):
    query, key, value, ancestors = problem(generator)

    def expect(error, match, query=query, key=key, value=value, ancestors=ancestors, bias=None):
        with pytest.raises(error, match=match):
            tree_attention(query, key, value, ancestors, bias)

    expect(TypeError, "query must be float16, .* got torch.int64", query=query.long())
    expect(TypeError, "value is torch.float16, but query is torch.float32", value=value.half())
    expect(ValueError, "key and value must have one shape", value=value[:, :, :9])
    expect(ValueError, r"got \(2, 3, 7, 16\) and \(2, 2, 37, 16\)", query=query[:, :3])
    expect(ValueError, r"got \(2, 4, 7, 0\)", query=query[..., :0], key=key[..., :0], value=value[..., :0])
    expect(ValueError, "key must end with the 7 nodes of the tree, but holds 6", key=key[:, :, :6], value=key[:, :, :6])
    expect(
        TypeError,
        r"ancestors must be bool, got torch.int64; ancestor_mask\(parents\) makes it",
        ancestors=ancestors.long(),
    )
    expect(ValueError, "with nodes = 7, batch = 2, got", ancestors=ancestors[:6])
    expect(TypeError, "bias must be floating point, got torch.bool", bias=torch.ones(1, 1, 37, dtype=torch.bool))
    expect(ValueError, r"bias must be .* = \(2, 2, 37\), got \(2, 1, 30\)", bias=torch.zeros(2, 1, 30))
    expect(ValueError, "ancestors is on meta, but query is on cpu", ancestors=ancestors.to("meta"))


def test_double_precision(generator):
    p = problem(generator, dtype=torch.float64)
    for actual, expected in zip(tree_attention(*p), in_double(*p)):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert explain(tree_attention, *p).body == "cpu"


def test_gradient_is_refused(generator):
    query, *rest = problem(generator)
    with pytest.raises(NotImplementedError, match=r"tree_attention has no gradient: call it under torch.no_grad\(\)"):
        tree_attention(query.requires_grad_(), *rest)[0].sum().backward()


def test_registration_is_sound(generator):
    torch.library.opcheck(torch.ops.tersor.tree_attention.default, problem(generator))
    p = problem(generator, dtype=torch.bfloat16, trees=True)
    torch.library.opcheck(torch.ops.tersor.tree_attention.default, (*p, torch.zeros(1, 1, 37)))


def test_compiles_into_one_graph(generator):
    p = problem(generator)
    compiled = torch.compile(lambda *x: tree_attention(*x)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*p), tree_attention(*p)[0] * 2)
