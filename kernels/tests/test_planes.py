"""Byte planes: every bit pattern survives the way there and back, and the exponent is plane 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels import backend
from tersor.kernels.planes import plane_merge, plane_split

WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
ONE_BYTE = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(WORDS.get(x.dtype, torch.uint8))


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """Every number of 16 bits: NaN payloads, -0 and subnormals among them; of 32 bits, each half next to its mirror."""
    half = torch.arange(-(2**15), 2**15)
    if dtype == torch.float32:
        return (half << 16 | half.flip(0) & 0xFFFF).to(torch.int32).view(dtype)
    return half.to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_every_bit_pattern_survives(body, dtype):
    x = every_pattern(dtype)
    before = bits(x).clone()
    first, rest = plane_split(x)
    assert first.shape == (len(x),)
    assert rest.shape == (dtype.itemsize - 1, len(x))
    assert torch.equal(bits(plane_merge(first, rest, dtype)), before)
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_planes_are_the_bytes_of_the_rotated_word(body, dtype):
    x = every_pattern(dtype)[::331]
    width = 8 * dtype.itemsize
    word = bits(x).long() & 2**width - 1
    rotated = (word << 1 | word >> width - 1) & 2**width - 1
    expected = [(rotated >> shift & 255).to(torch.uint8) for shift in range(width - 8, -1, -8)]
    assert torch.equal(all_planes(x), torch.stack(expected))


def all_planes(x: torch.Tensor) -> torch.Tensor:
    first, rest = plane_split(x)
    return torch.cat([first[None], rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_first_plane_is_the_exponent(body, dtype):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -(2.0**-126), float("inf"), float("nan")], dtype=dtype)
    assert plane_split(x)[0].tolist() == [0, 0, 127, 127, 128, 1, 255, 255]


def test_types_of_one_byte_are_one_plane():
    for dtype in ONE_BYTE:
        x = torch.arange(256).to(torch.uint8).view(16, 16).view(dtype)
        first, rest = plane_split(x)
        assert first.data_ptr() != x.data_ptr()
        assert torch.equal(first, x.view(torch.uint8))
        assert rest.shape == (0, 16, 16)
        assert torch.equal(plane_merge(first, rest, dtype).view(torch.uint8), first)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(dtype=st.sampled_from(list(WORDS)), shape=st.lists(st.integers(0, 40), max_size=3), seed=st.integers(0, 99))
def test_bodies_agree_on_any_shape(dtype, shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with backend("reference"):
        first, rest = plane_split(x)
        assert torch.equal(bits(plane_merge(first, rest, dtype)), bits(x))
    assert first.shape == x.shape
    assert rest.shape == (dtype.itemsize - 1, *shape)
    assert all(map(torch.equal, plane_split(x), (first, rest)))
    assert torch.equal(bits(plane_merge(first, rest, dtype)), bits(x))


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_strided_inputs(body, generator, dtype):
    x = torch.randn(30, 7, generator=generator).to(dtype).T[::2]
    planes = plane_split(x)
    assert all(map(torch.equal, planes, plane_split(x.contiguous())))
    strided = [torch.stack([plane, ~plane], -1)[..., 0] for plane in planes]
    assert torch.equal(plane_merge(*strided, dtype), x)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, dtype):
    x = torch.randn(5, 27, generator=generator).to(dtype)
    planes = plane_split(guarded(x))
    assert all(map(torch.equal, planes, plane_split(x)))
    assert torch.equal(plane_merge(*map(guarded, planes), dtype), x)


@pytest.fixture
def _several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_several_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_enough_for_several_threads(generator, dtype):
    x = torch.randn(99_991, generator=generator).to(dtype)
    planes = plane_split(x)
    with backend("reference"):
        assert all(map(torch.equal, plane_split(x), planes))
    assert torch.equal(plane_merge(*planes, dtype), x)


def test_bad_arguments_are_named():
    first, rest = plane_split(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"plane_split: .* not for torch.int64; use .view\(torch.uint8\)"):
        plane_split(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="plane_merge: .* not for torch.float64"):
        plane_merge(first, rest, torch.float64)
    with pytest.raises(TypeError, match="plane_merge: rest must be uint8, got torch.float32"):
        plane_merge(first, rest.float(), torch.bfloat16)
    with pytest.raises(ValueError, match="plane_merge: rest is on meta, but first is on cpu"):
        plane_merge(first, rest.to("meta"), torch.bfloat16)
    with pytest.raises(ValueError, match=r"the 3 other planes of torch.float32, \(3, 3\), got \(1, 3\)"):
        plane_merge(first, rest, torch.float32)


def test_registration_is_sound(generator):
    x = torch.randn(3, 5, generator=generator)
    torch.library.opcheck(torch.ops.tersor.plane_split.default, (x,))
    torch.library.opcheck(torch.ops.tersor.plane_merge.default, (*plane_split(x), torch.float32))


def test_compiles_into_one_graph(generator):
    x = torch.randn(3, 5, generator=generator).bfloat16()
    there_and_back = torch.compile(
        lambda x: plane_merge(*plane_split(x), torch.bfloat16) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(there_and_back(x), x + 1)


def test_there_is_no_gradient():
    assert not any(plane.requires_grad for plane in plane_split(torch.ones(3, requires_grad=True)))
