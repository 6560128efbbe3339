"""Layouts of other libraries: round trips, the words described, and the libraries' own results where they are there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels.bits import awq, compressed_tensors, gguf, gptq

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 1000)
# kind, bytes in a block, codes in a block
KINDS = {
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q8_0": (34, 32),
    "Q2_K": (84, 256),
    "Q3_K": (110, 256),
    "Q4_K": (144, 256),
}


def some_codes(seed, bits, *shape):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bit_of_stream(words, i):
    return words[i // 32] >> i % 32 & 1


@quick
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 5), seeds)
def test_gptq_weights_round_trip(bits, out, words, seed):
    codes = some_codes(seed, bits, out, 32 * words)
    qweight = gptq.pack_weight(codes, bits)
    assert qweight.dtype == torch.int32
    assert qweight.shape == (bits * words, out)
    assert torch.equal(gptq.unpack_weight(qweight, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_weights_are_streams_of_bits_along_the_inputs(bits):
    codes = some_codes(0, bits, 3, 64)
    qweight = gptq.pack_weight(codes, bits).tolist()
    for o in range(3):
        column = [row[o] for row in qweight]
        decoded = [sum(bit_of_stream(column, bits * i + b) << b for b in range(bits)) for i in range(64)]
        assert decoded == codes[o].tolist()


@quick
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0, 1]), seeds)
def test_gptq_zeros_round_trip(bits, words, groups, offset, seed):
    zero_point = some_codes(seed, bits, 32 * words, groups)
    qzeros = gptq.pack_zeros(zero_point, bits, offset)
    assert qzeros.shape == (groups, bits * words)
    assert torch.equal(gptq.unpack_zeros(qzeros, bits, offset), zero_point)


@pytest.mark.parametrize("bits", range(1, 9))
def test_first_version_of_gptq_stores_one_less_at_every_width(bits):
    zero_point = torch.full((32, 1), 2 ** (bits - 1), dtype=torch.uint8)
    stored = gptq.unpack_zeros(gptq.pack_zeros(zero_point, bits, offset=1), bits, offset=0)
    assert torch.equal(stored, zero_point - 1)


def test_first_version_of_gptq_stores_one_less():
    qzeros = torch.full((1, 1), 0x77777777, dtype=torch.int32)
    assert gptq.unpack_zeros(qzeros, 4).tolist() == [[8]] * 8
    assert gptq.unpack_zeros(qzeros, 4, offset=0).tolist() == [[7]] * 8


@quick
@given(st.integers(1, 4), st.integers(1, 9), seeds)
def test_awq_round_trip(words, n, seed):
    codes = some_codes(seed, 4, 8 * words, n)
    packed = awq.pack(codes)
    assert packed.shape == (n, words)
    assert torch.equal(awq.unpack(packed), codes)


def test_awq_interleaves_the_outputs():
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    assert f"{awq.pack(codes).item():08x}" == "75316420"  # the first in the lowest bits


@quick
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 70), seeds)
def test_compressed_tensors_round_trip(bits, out, n, seed):
    codes = some_codes(seed, bits, out, n)
    packed = compressed_tensors.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(compressed_tensors.unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_compressed_tensors_agrees_with_the_library(bits):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = some_codes(0, bits, 6, 50)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    packed = library.pack_to_int32(signed, bits)
    assert torch.equal(compressed_tensors.pack(codes, bits), packed)
    assert torch.equal(library.unpack_from_int32(packed, bits, torch.Size([6, 50])), signed)


@quick
@given(st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]), st.integers(0, 3), st.integers(0, 3), seeds)
def test_gguf_round_trip(kind, out, groups, seed):
    bits = 8 if kind == "Q8_0" else 4
    codes = some_codes(seed, bits, out, 32 * groups)
    generator = torch.Generator().manual_seed(seed)
    scale, offset = torch.randn(2, out, groups, generator=generator).half().float()
    if kind != "Q4_1":
        offset = -(2 ** (bits - 1)) * scale
    data = gguf.encode(codes, scale, offset, kind)
    assert data.shape == (out, KINDS[kind][0] * groups)
    for a, b in zip(gguf.decode(data, kind), (codes, scale, offset)):
        assert torch.equal(a, b)


@quick
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 3), st.integers(1, 3), seeds)
def test_gguf_agrees_with_the_library(kind, out, blocks, seed):
    library = pytest.importorskip("gguf.quants")
    nbytes, block = KINDS[kind]
    data = some_codes(seed, 8, out, blocks, nbytes)
    # random bytes, but finite scales: the halves lie at the start, or at the end of the block
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_1": (0, 2), "Q4_K": (0, 2)}.get(kind, (0,)):
        data[..., start + 1] &= 0xBB
    data = data.flatten(1)
    expected = torch.from_numpy(library.dequantize(data.numpy(), library.GGMLQuantizationType[kind]))
    codes, scale, offset = gguf.decode(data, kind)
    assert codes.shape == (out, block * blocks)
    weight = codes.unflatten(-1, (scale.shape[1], -1)) * scale[..., None] + offset[..., None]
    assert torch.equal(weight.flatten(1), expected)


@quick
@given(st.sampled_from(["Q2_K", "Q3_K", "Q4_K"]), st.integers(0, 3), st.integers(1, 3), seeds)
def test_gguf_k_types_give_back_their_bytes_and_mean_what_they_say(kind, out, blocks, seed):
    """Of any bytes, NaN among the scales included."""
    data = some_codes(seed, 8, out, blocks * KINDS[kind][0])
    stored = gguf.decode_k(data, kind)
    if kind == "Q3_K":
        assert not stored.minimum.any()
    assert torch.equal(gguf.encode_k(stored, kind), data)
    codes, scale, offset = gguf.decode(data, kind)
    assert torch.equal(codes, stored.codes)
    each = scale.shape[1] // blocks
    expected = stored.block_scale.float().repeat_interleave(each, -1) * stored.scale
    torch.testing.assert_close(scale, expected, equal_nan=True, rtol=0, atol=0)
    if kind != "Q3_K":
        expected = -stored.block_minimum.float().repeat_interleave(each, -1) * stored.minimum
        torch.testing.assert_close(offset, expected, equal_nan=True, rtol=0, atol=0)


def test_gguf_k_types_name_what_they_cannot_hold():
    stored = gguf.decode_k(torch.zeros(2, 144, dtype=torch.uint8), "Q4_K")
    for changed, match in (
        ({"scale": stored.scale + 64}, "scale of Q4_K must be 0 to 63"),
        ({"minimum": stored.minimum - 1}, "minimum of Q4_K must be 0 to 63"),
        ({"codes": stored.codes + 16}, "codes of Q4_K must be 0 to 15"),
        ({"codes": stored.codes[:, 1:]}, r"codes must be \(out, 256 blocks\), got \(2, 255\)"),
        ({"block_scale": stored.block_scale.float()}, r"block_scale of Q4_K must be torch.float16 \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=f"gguf: {match}"):
            gguf.encode_k(stored._replace(**changed), "Q4_K")
    with pytest.raises(ValueError, match="the K types built in are Q2_K, Q3_K, Q4_K, not 'Q4_0'"):
        gguf.encode_k(stored, "Q4_0")
    with pytest.raises(ValueError, match="whole Q4_K blocks of 144 bytes"):
        gguf.decode_k(torch.zeros(2, 145, dtype=torch.uint8), "Q4_K")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf_encodes_what_the_library_quantizes(generator, kind):
    library = pytest.importorskip("gguf.quants")
    data = library.quantize(torch.randn(3, 96, generator=generator).numpy(), library.GGMLQuantizationType[kind])
    data = torch.from_numpy(data)
    assert torch.equal(gguf.encode(*gguf.decode(data, kind), kind), data)


def test_bad_arguments_are_named():
    codes = some_codes(0, 4, 8, 32)
    words = gptq.pack_weight(codes, 4)
    eights, scale = torch.full((32, 1), 8, dtype=torch.uint8), torch.ones(8, 1)

    def expect(error, match, call, *args):
        with pytest.raises(error, match=match):
            call(*args)

    expect(ValueError, "gptq: bits must be 1 to 8, got 9", gptq.unpack_weight, words, 9)
    expect(TypeError, r"gptq: words must be torch.int32 with two dimensions", gptq.unpack_weight, words.long(), 4)
    expect(TypeError, r"gptq: codes must be torch.uint8 .* got torch.int64", gptq.pack_weight, codes.long(), 4)
    expect(ValueError, "gptq: codes of 3 bits must be 0 to 7, but the largest is 15", gptq.pack_weight, codes, 3)
    expect(ValueError, "gptq: 31 codes of 4 bits do not fill words", gptq.pack_weight, codes[:, :31], 4)
    expect(ValueError, "gptq: 4 words are no whole number of codes of 3 bits", gptq.unpack_weight, words, 3)
    expect(ValueError, "gptq: codes of 3 bits must be 0 to 7, but the largest is 8", gptq.pack_zeros, eights, 3)
    expect(ValueError, "awq: out = 7 is not a multiple of 8", awq.pack, codes[:7])
    expect(TypeError, "awq: words must be torch.int32", awq.unpack, codes)
    expect(ValueError, "33 codes of 4 bits take 5 words, but there are 4", compressed_tensors.unpack, words.T, 4, 33)
    expect(ValueError, "compressed_tensors: codes of 2 bits must be 0 to 3", compressed_tensors.pack, codes, 2)
    expect(ValueError, "the layouts of Q4_0, .* are built in, not that of 'IQ1_S'", gguf.decode, codes, "IQ1_S")
    expect(ValueError, "a row of 32 bytes is no whole number of Q4_0 blocks of 18", gguf.decode, codes, "Q4_0")
    expect(TypeError, r"gguf: data must be torch.uint8 \(out, bytes\)", gguf.decode, codes.long(), "Q4_0")
    expect(
        NotImplementedError,
        "the scales of Q4_K are integers; encode_k takes them",
        gguf.encode,
        codes,
        scale,
        scale,
        "Q4_K",
    )
    expect(ValueError, r"scale must be \(out, in / 32\) = \(8, 1\)", gguf.encode, codes, scale[1:], scale, "Q4_1")
    expect(ValueError, "gguf: scale is not float16; choose", gguf.encode, codes, scale / 3, scale, "Q4_1")
    expect(ValueError, "gguf: offset is not float16; choose", gguf.encode, codes, scale, scale / 3, "Q4_1")
    expect(ValueError, "the zero point of Q4_0 is 8", gguf.encode, codes, scale, scale, "Q4_0")
    expect(ValueError, "codes of Q4_1 must be 0 to 15", gguf.encode, codes | 16, scale, scale, "Q4_1")
    expect(ValueError, r"codes must be torch.uint8 \(out, 32 groups\)", gguf.encode, codes[:, 1:], scale, scale, "Q4_1")
