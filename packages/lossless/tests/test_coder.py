"""Coders: decode undoes encode; nothing but an encoded plane is decoded; Huffman comes near its bound."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.lossless import coder

ORDER0 = [coder.Rans11(), coder.Prefix6(), coder.Tiered(), coder.FixedPlanes(3), coder.FixedPlanes(4)]
CODERS = [coder.Stored(), coder.Zstd(1), coder.Zstd(19), coder.Huffman(), *ORDER0]
# the first call compiles
ANY_TIME = settings(deadline=None, max_examples=60)


def test_every_coder_is_listed_here():
    assert {getattr(coder, name) for name in coder.__all__} == {type(piece) for piece in CODERS}


@pytest.mark.parametrize("piece", CODERS, ids=str)
@ANY_TIME
@given(
    plane=st.one_of(
        st.binary(max_size=3000), st.builds(lambda byte, n: byte * n, st.binary(max_size=3), st.integers(0, 9000))
    )
)
def test_decode_undoes_encode(piece, plane):
    stream = memoryview(bytes(piece.encode(memoryview(plane))))
    assert bytes(piece.decode(stream, len(plane))) == plane
    assert bytes(coder.DECODERS[piece.id](stream, len(plane))) == plane


@pytest.mark.parametrize("piece", CODERS, ids=str)
@ANY_TIME
@given(stream=st.binary(max_size=200), n=st.integers(0, 2**40))
def test_other_bytes_are_refused_before_anything_is_allocated(piece, stream, n):
    try:
        data = piece.decode(memoryview(stream), n)
    except ValueError:
        return
    assert len(data) == n


@pytest.mark.parametrize("piece", CODERS[1:], ids=str)
def test_a_wrong_length_is_refused(piece):
    stream = memoryview(bytes(piece.encode(memoryview(b"abc" * 100))))
    for n in (0, 299, 301, 2**50):
        with pytest.raises(ValueError):
            piece.decode(stream, n)
    with pytest.raises(ValueError):
        piece.decode(memoryview(bytes(stream) + b"\0"), 300)


@pytest.mark.parametrize("piece", CODERS[1:], ids=str)
@ANY_TIME
@given(data=st.data())
def test_damaged_bytes_are_refused_or_give_as_many(piece, data):
    symbols = np.random.default_rng(0).geometric(0.3, 1000).astype(np.uint8)
    stream = bytearray(piece.encode(symbols.data))
    for _ in range(data.draw(st.integers(1, 3))):
        # the head and the table lie at the ends
        at = data.draw(st.integers(0, len(stream) - 1) | st.integers(0, 15) | st.integers(-60, -1))
        stream[at] = data.draw(st.integers(0, 255))
    stream = stream[: data.draw(st.just(len(stream)) | st.integers(0, len(stream)))]
    try:
        decoded = piece.decode(memoryview(bytes(stream)), symbols.size)
    except ValueError:
        return
    assert len(decoded) == symbols.size


def test_settings_are_checked():
    with pytest.raises(ValueError, match="level must be 1 to 22, got 23"):
        coder.Zstd(23)
    with pytest.raises(ValueError, match="bits must be 3 or 4, got 5"):
        coder.FixedPlanes(5)


@pytest.mark.parametrize("piece", ORDER0, ids=str)
def test_order_0_codes_leave_noise_alone_and_keep_one_byte_of_equal_ones(piece):
    noise = np.random.default_rng(0).integers(0, 256, 2**16, np.uint8)
    assert bytes(piece.encode(noise.data))[16:] == noise.tobytes()
    assert bytes(piece.encode(bytes([7]) * 2**16))[16:] == bytes([7])


def test_order_0_codes_are_ordered_by_size(gaussian_bf16):
    exponents = ((gaussian_bf16(512, 512) >> 7) & 0xFF).astype(np.uint8).ravel()
    p = np.bincount(exponents) / exponents.size
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    rans, prefix, tiered, fixed, wide = (8 * len(piece.encode(exponents.data)) / exponents.size for piece in ORDER0)
    assert entropy < rans < 1.01 * entropy
    assert rans < prefix < huffman_bits(exponents) + 0.1  # the escape, its bytes, and 64 lanes to begin with
    assert prefix < min(tiered, fixed)
    assert max(tiered, fixed) < wide < 4.1


def huffman_bits(plane: np.ndarray) -> float:
    """Mean length of an ideal Huffman code: the sum of the inner nodes of its tree."""
    counts = [int(count) for count in np.bincount(plane) if count]
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:
        total += (inner := heapq.heappop(counts) + heapq.heappop(counts))
        heapq.heappush(counts, inner)
    return total / plane.size


def test_huffman_of_exponents_is_near_the_ideal_code_and_below_every_lz_level(gaussian_bf16):
    exponents = ((gaussian_bf16(512, 512) >> 7) & 0xFF).astype(np.uint8).ravel()
    bits = 8 * len(coder.Huffman().encode(exponents.data)) / exponents.size
    assert huffman_bits(exponents) < bits < huffman_bits(exponents) + 0.03
    for level in (1, 3, 9):
        assert bits < 8 * len(coder.Zstd(level).encode(exponents.data)) / exponents.size - 0.2


def test_huffman_still_finds_runs_of_zeros():
    assert len(coder.Huffman().encode(memoryview(bytes(2**18)))) < 100
