"""Bit packing: exact for every width and length, in the layout that the docs describe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend, pack_bits, unpack_bits

ALL_BITS = range(1, 9)


def some_codes(generator, bits, *shape):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def bit(packed: list[int], bits: int, n: int, code: int, b: int) -> int:
    """Bit b of one code, from the layout's description and nothing else."""
    c = (n + 7) // 8
    start = shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            if shift <= b < shift + width:
                byte = packed[start + code % (width * c)]
                return byte >> (code // (width * c) * width + b - shift) & 1
            start += width * c
            shift += width
    raise AssertionError


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("n", [1, 13, 64, 100])
def test_layout_is_the_one_described(body, generator, bits, n):
    codes = some_codes(generator, bits, n)
    packed = pack_bits(codes, bits).tolist()
    assert [sum(bit(packed, bits, n, i, b) << b for b in range(bits)) for i in range(n)] == codes.tolist()


def test_examples_of_the_layout():
    assert pack_bits(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0], dtype=torch.uint8), 1).tolist() == [0b1001]
    assert pack_bits(torch.tensor([7, 0, 0, 0, 5], dtype=torch.uint8), 3).tolist() == [0b010011, 0, 0b10001]
    assert pack_bits(torch.tensor([200, 3], dtype=torch.uint8), 8).tolist() == [200, 3, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 64), (1,), (3, 7), (0, 5), (3, 0), (0,)], ids=str)
def test_round_trip_and_byte_count(body, generator, bits, shape):
    codes = some_codes(generator, bits, *shape)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8) * bits)
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(bits=st.integers(1, 8), rows=st.integers(1, 3), n=st.integers(0, 700), seed=st.integers(0, 1000))
def test_round_trip_of_any_length(bits, rows, n, seed):
    codes = some_codes(torch.Generator().manual_seed(seed), bits, rows, n)
    with backend("reference"):
        packed = pack_bits(codes, bits)
        assert torch.equal(unpack_bits(packed, bits, n), codes)
    assert torch.equal(pack_bits(codes, bits), packed)
    assert torch.equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_many_rows_in_parallel(generator, bits):
    codes = some_codes(generator, bits, 1030, 192)
    with backend("reference"):
        packed = pack_bits(codes, bits)
    assert torch.equal(pack_bits(codes, bits), packed)
    assert torch.equal(unpack_bits(packed, bits, 192), codes)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_strided_inputs(body, generator, bits):
    codes = some_codes(generator, bits, 40, 6).T
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, pack_bits(codes.contiguous(), bits))
    strided = torch.stack([packed, ~packed], -1)[..., 0]
    assert torch.equal(unpack_bits(strided, bits, 40), codes)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("n", [37, 128])
def test_nothing_outside_is_read_or_written(body, generator, guarded, bits, n):
    codes = some_codes(generator, bits, 3, n)
    packed = pack_bits(guarded(codes), bits)
    assert torch.equal(packed, pack_bits(codes, bits))
    assert torch.equal(unpack_bits(guarded(packed), bits, n), codes)


def test_code_out_of_range_is_named(body):
    with pytest.raises(ValueError, match="codes of 3 bits must be 0 to 7, but the largest is 8"):
        pack_bits(torch.tensor([1, 8, 2], dtype=torch.uint8), 3)


def test_bad_arguments_are_named():
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            pack_bits(codes, bits)
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            unpack_bits(codes, bits, 16)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch.int64; use codes.to\(torch.uint8\)"):
        pack_bits(codes.long(), 4)
    with pytest.raises(TypeError, match="packed must be uint8"):
        unpack_bits(codes.float(), 4, 16)
    with pytest.raises(ValueError, match="codes must have at least one dimension"):
        pack_bits(torch.tensor(1, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="33 codes of 4 bits take 20 bytes, but packed holds 16"):
        unpack_bits(codes, 4, 33)
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        unpack_bits(codes, 4, -1)


def test_registration_is_sound(generator):
    codes = some_codes(generator, 3, 2, 3, 13)
    torch.library.opcheck(torch.ops.tersor.pack_bits.default, (codes, 3))
    torch.library.opcheck(torch.ops.tersor.unpack_bits.default, (pack_bits(codes, 3), 3, 13))


def test_compiles_into_one_graph(generator):
    codes = some_codes(generator, 5, 3, 20)
    there_and_back = torch.compile(lambda x: unpack_bits(pack_bits(x, 5), 5, 20) + 1, fullgraph=True, backend="eager")
    assert torch.equal(there_and_back(codes), codes + 1)
