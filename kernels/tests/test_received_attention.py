"""Column sums of attention: every body equals the sum of the full matrix, and none ever holds it."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.kernels import explain
from tersor.kernels.received_attention import received_attention


def some_heads(generator, batch=2, num_heads=4, kv_heads=2, queries=20, keys=20, head_dim=16, dtype=torch.float32):
    query = torch.randn(batch, num_heads, queries, head_dim, generator=generator)
    return query.to(dtype), torch.randn(batch, kv_heads, keys, head_dim, generator=generator).to(dtype)


def matrix(query: Tensor, key: Tensor, bias=None, is_causal=False, scale=None) -> tuple[Tensor, Tensor]:
    """The attention matrix, and the logarithm of its denominators, in float64."""
    k = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias[:, :, None].double()
    if is_causal:
        queries, keys = logits.shape[-2:]
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0), lse


def assert_close(actual: Tensor, expected: Tensor, rtol=1e-5) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(20, 20), (3, 70), (70, 3), (1, 1), (65, 130)], ids=str)
def test_column_sums_of_the_matrix(body, generator, shape, is_causal):
    query, key = some_heads(generator, queries=shape[0], keys=shape[1])
    assert_close(received_attention(query, key, is_causal=is_causal), matrix(query, key, None, is_causal)[0].sum(2))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 3)),
    queries=st.integers(0, 70),
    keys=st.integers(0, 70),
    head_dim=st.integers(1, 20),
    is_causal=st.booleans(),
    parts=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape(sizes, queries, keys, head_dim, is_causal, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = sizes
    query, key = some_heads(generator, batch, kv_heads * group, kv_heads, queries, keys, head_dim)
    weight = torch.rand(batch, 1, queries, generator=generator) if parts[0] else None
    bias = torch.randn(1, kv_heads * group, keys, generator=generator) if parts[1] else None
    A, _ = matrix(query, key, bias, is_causal)
    expected = (A if weight is None else A * weight[..., None]).sum(2)
    assert_close(received_attention(query, key, weight, bias, None, is_causal), expected)


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (2, 1)], ids=str)
def test_queries_are_weighted(body, generator, shape):
    query, key = some_heads(generator)
    weight = torch.randn(*shape, 20, generator=generator)
    assert_close(received_attention(query, key, weight), (matrix(query, key)[0] * weight[..., None].double()).sum(2))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (1, 4)], ids=str)
def test_keys_are_hidden_and_counted(body, generator, shape, is_causal):
    query, key = some_heads(generator)
    bias = torch.randn(*shape, 20, generator=generator)
    bias[..., :3] = -torch.inf  # with a causal mask, the first three queries see nothing
    received = received_attention(query, key, bias=bias, is_causal=is_causal)
    assert_close(received, matrix(query, key, bias, is_causal)[0].sum(2))
    assert not received[..., :3].any()


def test_total_is_the_number_of_queries_that_see_a_key(body, generator):
    query, key = some_heads(generator, queries=30, keys=20)
    received = received_attention(query, key, is_causal=True)
    torch.testing.assert_close(received.sum(-1), torch.full((2, 4), 20.0))


def test_known_denominators_make_segments_add_up(body, generator):
    query, key = some_heads(generator, keys=50)
    A, lse = matrix(query, key)
    segments = [received_attention(query, part, lse=lse.float()) for part in key.split([7, 43], 2)]
    assert_close(torch.cat(segments, -1), A.sum(2))


def test_last_queries_are_an_observation_window(body, generator):
    query, key = some_heads(generator, queries=40, keys=40)
    weight = torch.zeros(1, 1, 40).index_fill(2, torch.arange(32, 40), 1.0)
    torch.testing.assert_close(
        received_attention(query[:, :, 32:], key, is_causal=True),
        received_attention(query, key, weight, is_causal=True),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(body, generator, dtype):
    query, key = some_heads(generator, dtype=dtype)
    assert_close(received_attention(query, key, scale=0.3), matrix(query, key, scale=0.3)[0].sum(2), 2e-5)


def test_a_head_that_sees_nothing_receives_nothing(body, generator):
    query, key = some_heads(generator)
    bias = torch.zeros(2, 1, 20)
    bias[1] = -torch.inf
    received = received_attention(query, key, bias=bias)
    assert not received[1].any()
    assert_close(received[:1], matrix(query, key)[0].sum(2)[:1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_propagates(body, generator):
    query, key = some_heads(generator)
    clean = received_attention(query, key)
    query[0, 1, 3, 2] = key[1, 1, 4, 0] = float("nan")
    received = received_attention(query, key)
    assert received[0, 1].isnan().all()
    assert received[1, 2:].isnan().all()
    assert torch.equal(received[0, [0, 2, 3]], clean[0, [0, 2, 3]])


def test_empty_tensors(body, generator):
    for shape in ({"queries": 0}, {"keys": 0}, {"batch": 0}, {"num_heads": 0}):
        query, key = some_heads(generator, **shape)
        received = received_attention(query, key, is_causal=True)
        assert torch.equal(received, torch.zeros(*query.shape[:2], key.shape[2]))


def test_nothing_outside_is_read_or_written(body, generator, guarded):
    query, key = some_heads(generator, keys=70, head_dim=20)
    weight, bias = torch.rand(2, 4, 20, generator=generator), torch.randn(2, 4, 70, generator=generator)
    received = received_attention(guarded(query), guarded(key), guarded(weight), guarded(bias))
    assert_close(received, (matrix(query, key, bias)[0] * weight[..., None]).sum(2))


def test_strided_inputs(body, generator):
    query, key = some_heads(generator)
    strided = received_attention(query.mT.contiguous().mT, key.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(strided, received_attention(query, key), rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The bytes of the largest result of any operation of PyTorch's."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_matrix_is_never_held(generator, name, is_causal):
    n = 3000
    query, key = some_heads(generator, 1, 2, 1, n, n, 4)
    # not through the dispatcher, behind which the mode sees nothing
    run = received_attention.__wrapped__
    if name == "cpu":
        run = importlib.import_module("tersor.kernels.received_attention.cpu").received_attention
    with Largest() as largest:
        received = run(query, key, is_causal=is_causal)
    assert largest.nbytes <= 2**22  # the matrix takes 72 MB
    torch.testing.assert_close(received.sum(-1), torch.full((1, 2), float(n)), rtol=1e-5, atol=0)


def test_bad_arguments_are_named(generator):
    query, key = some_heads(generator)
    with pytest.raises(TypeError, match="query must be float16, .* got torch.int64"):
        received_attention(query.long(), key)
    with pytest.raises(TypeError, match=r"key is torch.float16, but query is torch.float32; use key.to\(query.dtype\)"):
        received_attention(query, key.half())
    with pytest.raises(ValueError, match=r"num_heads a multiple of .* got \(2, 3, 20, 16\) and \(2, 2, 20, 16\)"):
        received_attention(query[:, :3], key)
    with pytest.raises(ValueError, match=r"got \(2, 4, 20, 16\) and \(2, 2, 20, 8\)"):
        received_attention(query, key[..., :8])
    with pytest.raises(TypeError, match="bias must be floating point, got torch.bool"):
        received_attention(query, key, bias=torch.ones(2, 4, 20, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"weight must be broadcastable to \(batch, num_heads, queries\) = \(2, 4, 20\)"
    ):
        received_attention(query, key, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"lse must be \(batch, num_heads, queries\) = \(2, 4, 20\), got \(1, 4, 20\)"):
        received_attention(query, key, lse=torch.ones(1, 4, 20))
    with pytest.raises(ValueError, match="key is on meta, but query is on cpu"):
        received_attention(query, key.to("meta"))


def test_double_precision(generator):
    query, key = some_heads(generator, dtype=torch.float64)
    torch.testing.assert_close(received_attention(query, key), matrix(query, key)[0].sum(2))
    assert explain(received_attention, query, key).body == "cpu"


def test_gradient_is_refused(generator):
    query, key = some_heads(generator)
    with pytest.raises(
        NotImplementedError, match=r"received_attention has no gradient: call it under torch.no_grad\(\)"
    ):
        received_attention(query.requires_grad_(), key).sum().backward()


def test_registration_is_sound(generator):
    query, key = some_heads(generator)
    torch.library.opcheck(torch.ops.tersor.received_attention.default, (query, key, None, torch.ones(1, 1, 20)))
    query, key = some_heads(generator, queries=3, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tersor.received_attention.default, (query, key, None, None, None, True, 0.5))


def test_compiles_into_one_graph(generator):
    query, key = some_heads(generator)
    compiled = torch.compile(lambda *x: received_attention(*x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), received_attention(query, key) * 2)
