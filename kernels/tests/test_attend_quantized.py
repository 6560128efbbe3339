"""Attention over packed codes: every body agrees with float64, on ragged shapes, and reads nothing else."""

import importlib.util
import time
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.kernels import backend, explain, pack_bits
from tersor.kernels.attend_quantized import attend_quantized
from tersor.kernels.merge_attention import merge_attention


class Problem(NamedTuple):
    query: Tensor
    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    key_bits: int = 4
    value_bits: int = 4
    key_token_group: int = 1
    value_token_group: int = 1
    bias: Tensor | None = None
    scale: float | None = None


def stream(generator, batch, heads, seq, head_dim, bits, token_group, channel_groups, dtype=torch.float32):
    codes = torch.randint(0, 2**bits, (batch, heads, seq, head_dim), dtype=torch.uint8, generator=generator)
    grid = (batch, heads, -(-seq // token_group), channel_groups)
    scale = torch.rand(grid, generator=generator).add(0.1).div(2**bits)
    minimum = torch.randn(grid, generator=generator).sub(0.5)
    return pack_bits(codes, bits), scale.to(dtype), minimum.to(dtype)


def problem(
    generator, bits=4, batch=2, num_heads=4, kv_heads=2, queries=1, seq=37, head_dim=16, token_group=8, groups=2,
    dtype=torch.float32, grid_dtype=torch.float32,
) -> Problem:  # fmt: skip
    """KIVI's grids: keys per channel over `token_group` tokens, values per token over `groups` groups of channels."""
    query = torch.randn(batch, num_heads, queries, head_dim, generator=generator).to(dtype)
    key = stream(generator, batch, kv_heads, seq, head_dim, bits, token_group, head_dim, grid_dtype)
    value = stream(generator, batch, kv_heads, seq, head_dim, bits, 1, groups, grid_dtype)
    return Problem(query, key, value, bits, bits, token_group)


def in_double(p: Problem) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        return attend_quantized(p.query.double(), *p[1:])


def assert_close(actual: tuple[Tensor, Tensor], p: Problem, unit: float = 1e-5) -> None:
    (output, lse), (expected, expected_lse) = actual, in_double(p)
    assert (output.dtype, lse.dtype) == (p.query.dtype, torch.float32)
    torch.testing.assert_close(output.double(), expected, rtol=unit, atol=unit)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=unit, atol=unit)


def decoded(stream: tuple[Tensor, ...], bits: int, token_group: int) -> Tensor:
    """The definition, element by element."""
    packed, scale, minimum = stream
    codes = torch.stack([packed >> bits * i & 2**bits - 1 for i in range(8 // bits)], -2).flatten(-2)  # fields
    x = torch.empty(codes.shape, dtype=torch.float64)
    for t in range(x.shape[2]):
        for c in range(x.shape[3]):
            at = t // token_group, c // (x.shape[3] // scale.shape[3])
            x[:, :, t, c] = minimum[:, :, *at] + codes[:, :, t, c] * scale[:, :, *at].double()
    return x


@pytest.mark.parametrize("num_heads", [2, 6])
def test_equals_sdpa_over_the_decoded_cache(body, generator, num_heads):
    p = problem(generator, num_heads=num_heads, queries=3, seq=11)
    k, v = decoded(p.key, 4, 8), decoded(p.value, 4, 1)
    expected = scaled_dot_product_attention(p.query.double(), k, v, enable_gqa=True)
    output, lse = attend_quantized(*p)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    logits = p.query.double() @ k.repeat_interleave(num_heads // 2, 1).mT / 4
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 37, 64), (3, 70, 20), (1, 1, 6)], ids=str)
def test_all_widths_and_ragged_shapes(body, generator, bits, shape):
    queries, seq, head_dim = shape
    p = problem(generator, bits, 1, queries=queries, seq=seq, head_dim=head_dim)
    assert_close(attend_quantized(*p), p)


# (query heads, queries, tokens, channels, tokens and channels of a group): rows of a head, four by four, are their product
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("shape", [(4, 2, 70, 64, 32, 32), (8, 1, 600, 128, 64, 64), (16, 1, 5, 32, 96, 32)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_codes_are_multiplied_in_place(vectors, guarded, generator, bits, shape, threads):
    num_heads, queries, seq, head_dim, token_group, group_size = shape
    p = problem(
        generator, bits, 1, num_heads, 2, queries, seq, head_dim, token_group, head_dim // group_size, torch.float32,
        torch.float16,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        key, value = (tuple(guarded(t) for t in each) for each in (p.key, p.value))
        assert_close(attend_quantized(guarded(p.query), key, value, *p[3:]), p)
        # grids of the other kind on either side
        value = stream(generator, 1, 2, seq, head_dim, bits, 32, head_dim)
        assert_close(attend_quantized(*(p := p._replace(value=value, value_token_group=32))), p)
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    bits=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    heads_each=st.integers(1, 5),
    queries=st.integers(0, 4),
    seq=st.integers(0, 100),
    token_groups=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.tuples(st.integers(1, 8), st.integers(1, 12)),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_grid(bits, batch, kv_heads, heads_each, queries, seq, token_groups, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    groups, group_size = channels
    head_dim = groups * group_size
    key = stream(generator, batch, kv_heads, seq, head_dim, bits[0], token_groups[0], groups)
    value = stream(generator, batch, kv_heads, seq, head_dim, bits[1], token_groups[1], group_size)
    query = torch.randn(batch, kv_heads * heads_each, queries, head_dim, generator=generator)
    p = Problem(query, key, value, *bits, *token_groups)
    assert_close(attend_quantized(*p), p)


@pytest.mark.parametrize("token_group", [1, 5, 64])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_any_grid_serves_keys_and_values(body, generator, token_group, groups):
    key, value = (stream(generator, 1, 2, 13, 16, 4, token_group, groups) for _ in range(2))
    p = Problem(torch.randn(1, 2, 1, 16, generator=generator), key, value, 4, 4, token_group, token_group)
    assert_close(attend_quantized(*p), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(body, generator, dtype):
    p = problem(generator, seq=45, dtype=dtype, grid_dtype=dtype)
    output, lse = attend_quantized(*p)
    expected, expected_lse = in_double(p)
    # one rounding at the end, of numbers below 4; the GPU body also rounds keys and values, the interpreter cuts off
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * (4 if body == "gpu" else 1)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=unit)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5 if body != "gpu" else 2 * unit)


def test_blocks_of_the_cache_are_served_as_they_are(body, generator):
    """Grids as `tersor.kvcache` stores them: one dimension more, in 16 bits."""
    p = problem(generator, grid_dtype=torch.float16)
    stored = p._replace(
        key=(p.key[0], *(t.unsqueeze(3) for t in p.key[1:])), value=(p.value[0], *(t.unsqueeze(4) for t in p.value[1:]))
    )
    for actual, expected in zip(attend_quantized(*stored), attend_quantized(*p)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_bias_hides_and_weighs_tokens(body, generator, shape):
    bias = torch.randn(*shape, 37, generator=generator)
    bias[..., ::3] = -float("inf")
    p = problem(generator)._replace(bias=bias)
    assert_close(attend_quantized(*p), p)


def test_hidden_tokens_change_nothing(body, generator):
    p = problem(generator, seq=40)
    hidden = torch.zeros(1, 1, 40).index_fill(2, torch.arange(24, 40), -torch.inf)
    shorter = [(t[0][:, :, :24], *(g[:, :, : 24 * g.shape[2] // 40] for g in t[1:])) for t in (p.key, p.value)]
    expected = attend_quantized(p.query, *shorter, *p[3:])
    for actual, wanted in zip(attend_quantized(*p._replace(bias=hidden)), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_has_output_0_and_lse_minus_infinity(body, generator):
    bias = torch.zeros(2, 1, 37)
    bias[1] = -torch.inf
    p = problem(generator)._replace(bias=bias)
    output, lse = attend_quantized(*p)
    assert not output[1].any()
    assert (lse[1] == -torch.inf).all()
    for actual, wanted in zip((output[0], lse[0]), in_double(p)):
        torch.testing.assert_close(actual.double(), wanted[0], rtol=1e-5, atol=1e-5)


def test_the_lowest_number_as_a_mask_is_a_number(body, generator):
    lowest = torch.full((1, 1, 37), torch.finfo(torch.float32).min)
    p = problem(generator)
    output, _ = attend_quantized(*p._replace(query=p.query * 0, bias=lowest))
    expected, _ = in_double(p._replace(query=p.query * 0))
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_empty_tensors(body, generator):
    output, lse = attend_quantized(*problem(generator, seq=0))
    assert torch.equal(output, torch.zeros(2, 4, 1, 16))
    assert torch.equal(lse, torch.full((2, 4, 1), -torch.inf))
    for shape in ({"batch": 0}, {"queries": 0}, {"num_heads": 0}):
        p = problem(generator, **shape)
        output, lse = attend_quantized(*p)
        assert (output.shape, lse.shape) == (p.query.shape, p.query.shape[:3])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
def test_nan_propagates(body, generator):
    p = problem(generator, queries=2)
    clean = attend_quantized(*p)
    p.query[0, 0, 0, 3] = float("nan")
    p.value[1][1, 1, 4, 0] = float("nan")
    output, lse = attend_quantized(*p)
    assert output[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    assert output[1, 2:, :, :8].isnan().all()
    output[1, 2:, :, :8], output[0, 0, 0], lse[0, 0, 0] = clean[0][1, 2:, :, :8], clean[0][0, 0, 0], clean[1][0, 0, 0]
    torch.testing.assert_close(output, clean[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, clean[1], rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow(body, generator):
    p = problem(generator)._replace(scale=300.0)
    assert_close(attend_quantized(*p), p, 1e-3)  # exp of numbers near 1000: 2^-24 * 1000


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_nothing_outside_is_read_or_written(body, generator, guarded, bits, head_dim):
    p = problem(generator, bits, head_dim=head_dim)._replace(bias=torch.randn(1, 1, 37, generator=generator))
    inside = p._replace(
        query=guarded(p.query), key=[*map(guarded, p.key)], value=[*map(guarded, p.value)], bias=guarded(p.bias)
    )
    assert_close(attend_quantized(*inside), p)


def test_strided_inputs(body, generator):
    p = problem(generator)
    strided = p._replace(
        query=p.query.mT.contiguous().mT,
        key=[t.mT.contiguous().mT for t in p.key],
        value=[t.transpose(1, 2).contiguous().transpose(1, 2) for t in p.value],
    )
    for actual, expected in zip(attend_quantized(*strided), attend_quantized(*p)):
        assert torch.equal(actual, expected)


def test_long_sequences_are_split_and_merged(body, generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        p = problem(generator, batch=1, num_heads=2, kv_heads=1, seq=1025, head_dim=64, token_group=32)
        assert_close(attend_quantized(*p), p)
    finally:
        torch.set_num_threads(threads)


def test_segments_of_a_cache_merge(generator):
    p = problem(generator, seq=40)
    segments = []
    for a, b in ((0, 8), (8, 32), (32, 40)):
        key, value = [(s[0][:, :, a:b], *(g[:, :, a * g.shape[2] // 40 : b * g.shape[2] // 40] for g in s[1:]))
                      for s in (p.key, p.value)]  # fmt: skip
        segments.append(attend_quantized(p.query, key, value, *p[3:]))
    output, lse = zip(*segments)
    assert_close(merge_attention(torch.stack(output), torch.stack(lse)), p)


def test_bad_arguments_are_named(generator):
    p = problem(generator)

    def expect(error, match, **changed):
        with pytest.raises(error, match=match):
            attend_quantized(*p._replace(**changed))

    expect(TypeError, "query must be float16, .* got torch.int64", query=p.query.long())
    expect(ValueError, r"query must be .*, head_dim 1 or more, got \(2, 4, 16\)", query=p.query[:, :, 0])
    expect(ValueError, r"value must be \(packed, scale, minimum\), got 2 tensors", value=p.value[:2])
    expect(TypeError, "key's packed must be uint8, got torch.int32", key=(p.key[0].int(), *p.key[1:]))
    expect(TypeError, "value's scale must be floating point", value=(p.value[0], p.value[1].int(), p.value[2]))
    expect(ValueError, "key's minimum is on meta, but query is on cpu", key=(*p.key[:2], p.key[2].to("meta")))
    expect(ValueError, "key_bits must be 1 to 8, got 0", key_bits=0)
    expect(ValueError, "16 codes of 3 bits take 6 bytes, got", value_bits=3)
    expect(
        ValueError,
        r"value's packed must be .* = \(2, num_key_value_heads, 37, 8\)",
        value=tuple(t[:, :, :9] for t in p.value),
    )
    expect(ValueError, r"key's scale must be .* = \(2, 2, 10, ...\), got \(2, 2, 5, 16\)", key_token_group=4)
    expect(ValueError, "value_token_group must be 1 or more, got 0", value_token_group=0)
    expect(ValueError, "the 3 channel groups of value's scale do not divide head_dim = 16",
           value=(p.value[0], p.value[1].new_ones(2, 2, 37, 3), p.value[2]))  # fmt: skip
    expect(
        ValueError, "value's scale and minimum must have one shape", value=(p.value[0], p.value[1], p.value[2][..., :1])
    )
    expect(ValueError, "key has 2 heads, but value has 1", value=tuple(t[:, :1] for t in p.value))
    expect(ValueError, "num_heads = 3 is not a multiple of num_key_value_heads = 2", query=p.query[:, :3])
    expect(
        TypeError,
        "bias must be floating point, got torch.bool; for a mask",
        bias=torch.ones(1, 1, 37, dtype=torch.bool),
    )
    expect(ValueError, r"bias must be .* = \(2, 2, 37\), got \(1, 37\)", bias=torch.zeros(1, 37))


def test_double_precision_is_the_references(generator):
    p = problem(generator)
    assert explain(attend_quantized, *p._replace(query=p.query.double())).body == "reference"


def test_gradient_is_refused(generator):
    p = problem(generator)
    output, _ = attend_quantized(*p._replace(query=p.query.requires_grad_()))
    with pytest.raises(NotImplementedError, match=r"attend_quantized has no gradient: call it under torch.no_grad\(\)"):
        output.sum().backward()


def test_registration_is_sound(generator):
    p = problem(generator, queries=2)
    torch.library.opcheck(torch.ops.tersor.attend_quantized.default, p._replace(bias=torch.zeros(1, 2, 37)))
    p = problem(generator, 3, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tersor.attend_quantized.default, p)


def test_compiles_into_one_graph(generator):
    p = problem(generator)
    compiled = torch.compile(lambda x: attend_quantized(x, *p[1:])[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.query), attend_quantized(*p)[0] * 2)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_one_query_is_much_faster_than_dequantising(generator):
    p = problem(generator, batch=1, num_heads=8, kv_heads=2, seq=4096, head_dim=128, token_group=32, groups=4)

    def seconds(body):
        with backend(body):
            start = time.thread_time()
            attend_quantized(*p)
            return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds("cpu")
        # measured: 40 times; the other work of a shared machine hits both
        assert min(seconds("reference") for _ in range(3)) >= 4 * min(seconds("cpu") for _ in range(3))
    finally:
        torch.set_num_threads(threads)
