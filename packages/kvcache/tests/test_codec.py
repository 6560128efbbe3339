import inspect
from itertools import pairwise

import pytest
import torch

from tersor.kvcache import codec as codecs
from tersor.kvcache.codec import FullPrecision, PerChannel, PerToken

HEAD_DIM = 48


def all_codecs():
    """Every piece that the axis lists; those with settings at several of them."""
    pieces = []
    for name in codecs.__all__:
        piece = getattr(codecs, name)
        settings = [{"bits": 1, "group_size": 8}, {"bits": 3, "group_size": 12}, {"bits": 8, "group_size": 16}]
        pieces += [piece(**s) for s in settings] if "bits" in inspect.signature(piece).parameters else [piece()]
    return pieces


def random_states(generator, seq_len=96, dtype=torch.float32):
    x = torch.randn(2, 3, seq_len, HEAD_DIM, generator=generator)
    x[..., 5] += 20  # a channel far from zero, as keys have
    return x.to(dtype)


def nbytes(codes):
    return sum(t.nbytes for t in codes)


def per_value(t, piece):
    """Each group's number for each of its 16 values: (batch, heads, seq, head_dim)."""
    return t.repeat_interleave(16, 3).flatten(2, 3) if piece is PerChannel else t.repeat_interleave(16, 4).flatten(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", all_codecs(), ids=str)
def test_decoding_returns_shape_and_dtype(codec, dtype, generator):
    x = random_states(generator, dtype=dtype)
    decoded = codec.decode(codec.encode(x), dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    assert decoded.isfinite().all()


@pytest.mark.parametrize("codec", all_codecs(), ids=str)
def test_groups_are_encoded_independently(codec, generator):
    x = random_states(generator)
    whole = codec.encode(x)
    split = zip(codec.encode(x[:, :, :48]), codec.encode(x[:, :, 48:]))
    assert all(torch.equal(a, torch.cat(b, 2)) for a, b in zip(whole, split))
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, codec.encode(x[1:])))


@pytest.mark.parametrize("seq_len", [0, 1, 31, 48, 95, 96])
@pytest.mark.parametrize("codec", all_codecs(), ids=str)
def test_cropped_codes_decode_as_before(codec, seq_len, generator):
    codes = codec.encode(random_states(generator))
    cropped = codec.part(codes, 0, seq_len)
    assert cropped[0].shape[2] == seq_len
    assert torch.equal(codec.decode(cropped, torch.float32), codec.decode(codes, torch.float32)[:, :, :seq_len])


@pytest.mark.parametrize("piece", [PerChannel, PerToken])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_error_is_at_most_half_a_step(piece, bits, generator):
    codec, x = piece(bits, 16), random_states(generator)
    codes = codec.encode(x)
    scale, minimum = (per_value(t.float(), piece) for t in (codes.scale, codes.minimum))
    # 2^-11: float16 rounding of scale (times up to 2^bits) and minimum, see PerChannel
    bound = scale / 2 + 2**-11 * (minimum.abs() + 2**bits * scale)
    assert ((codec.decode(codes, torch.float32) - x).abs() <= bound).all()


@pytest.mark.parametrize("piece", [PerChannel, PerToken])
def test_each_bit_halves_the_error(piece, generator):
    x = torch.randn(2, 3, 96, HEAD_DIM, generator=generator)
    errors = [
        (codec.decode(codec.encode(x), torch.float32) - x).norm() for codec in (piece(bits, 16) for bits in range(1, 8))
    ]
    assert all(finer < 0.6 * coarser for coarser, finer in pairwise(errors))  # 0.6: a half, and float16 rounding


@pytest.mark.parametrize("piece", [PerChannel, PerToken])
def test_eight_bits_in_bfloat16_lose_little_more_than_bfloat16(piece, generator):
    codec, x = piece(8, 16), random_states(generator, dtype=torch.bfloat16)
    scale = codec.encode(x).scale.float().max()
    error = (codec.decode(codec.encode(x), torch.bfloat16).float() - x.float()).abs()
    assert (error <= 2**-8 * x.float().abs() + 1.5 * scale).all()  # 2^-8: bfloat16; scale and minimum are rounded too


@pytest.mark.parametrize("value", [0.0, 1.5, -20.0])
@pytest.mark.parametrize("codec", all_codecs(), ids=str)
def test_constant_groups_are_exact(codec, value):
    x = torch.full((1, 2, 48, HEAD_DIM), value)
    assert torch.equal(codec.decode(codec.encode(x), torch.float32), x)


@pytest.mark.parametrize("piece", [PerChannel, PerToken])
def test_values_closer_than_float16_can_tell_stay_close(piece):
    x = 1e-9 * torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    codec = piece(4, 32)
    assert (codec.decode(codec.encode(x), torch.float32) - x).abs().max() < 1e-7


def test_bytes_are_bits_per_value_and_two_16_bit_numbers_per_group():
    x = torch.randn(2, 3, 64, 128)
    for bits in range(1, 9):
        codes, groups = x.numel() * bits // 8, x.numel() // 32
        assert nbytes(PerChannel(bits, 32).encode(x)) == codes + groups * 4
        assert nbytes(PerToken(bits, 32).encode(x)) == codes + groups * 4
    assert nbytes(FullPrecision().encode(x)) == x.nbytes


def test_a_channel_far_from_zero_costs_per_channel_nothing(generator):
    x = random_states(generator)
    near = x.clone()
    near[..., 5] -= 20
    errors = {}
    for piece in (PerChannel, PerToken):
        for name, states in (("far", x), ("near", near)):
            codec = piece(2, 16)
            errors[piece, name] = (codec.decode(codec.encode(states), torch.float32) - states).norm()
    assert errors[PerChannel, "far"] < 1.01 * errors[PerChannel, "near"]
    assert errors[PerToken, "far"] > 2 * errors[PerToken, "near"]


@pytest.mark.parametrize("piece", [PerChannel, PerToken])
def test_bad_settings_are_named(piece):
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        piece(bits=9)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 0"):
        piece(bits=0)
    with pytest.raises(ValueError, match="group_size must be 1 or more, got 0"):
        piece(group_size=0)
