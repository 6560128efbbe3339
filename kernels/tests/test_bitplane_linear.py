"""Products of bit planes: every body gives the integers that int64 does, for all widths, zero points and padding."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend, bipolar_linear, bit_planes, bitplane_linear, explain
from tersor.kernels.bitplane_linear import plane_codes

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
WIDTHS = [(bits, x_bits) for bits in range(1, 9) for x_bits in range(1, 9)]


class Problem(NamedTuple):
    """Codes x (rows, in) and weight (out, in), their zero points, and scales of rows and groups."""

    x: Tensor
    x_scale: Tensor
    x_zero_point: Tensor
    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    x_bits: int

    @property
    def group_size(self) -> int:
        return self.x.shape[-1] // self.scale.shape[1]

    def planes(self) -> tuple[Tensor, Tensor]:
        groups = self.scale.shape[1]
        return bit_planes(self.x, self.x_bits, groups), bit_planes(self.weight, self.bits, groups)

    def asymmetric(self) -> tuple:
        x, weight = self.planes()
        return x, self.x_scale, self.x_zero_point, weight, self.scale, self.zero_point, self.group_size

    def bipolar(self) -> tuple:
        x, weight = self.planes()
        return x, self.x_scale, weight, self.scale, self.group_size

    def integers(self, bipolar: bool) -> Tensor:
        """(rows, out, groups), in int64."""
        x, w = (codes.long().unflatten(-1, (-1, self.group_size)) for codes in (self.x, self.weight))
        if bipolar:
            x, w = 2 * x - (2**self.x_bits - 1), 2 * w - (2**self.bits - 1)
        else:
            x, w = x - self.x_zero_point.long()[:, None, None], w - self.zero_point.long()[..., None]
        return (x[:, None] * w).sum(-1)


def some_codes(generator, bits: int, *shape) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def problem(generator, bits, x_bits, rows, out, n, groups=1, dtype=torch.float32) -> Problem:
    return Problem(
        some_codes(generator, x_bits, rows, n),
        torch.rand(rows, generator=generator).add(0.1).to(dtype),
        some_codes(generator, x_bits, rows),
        some_codes(generator, bits, out, n),
        torch.rand(out, groups, generator=generator).add(0.1).to(dtype),
        some_codes(generator, bits, out, groups),
        bits,
        x_bits,
    )


def unscaled(p: Problem, dtype=torch.float32) -> Problem:
    return p._replace(x_scale=torch.ones_like(p.x_scale, dtype=dtype), scale=torch.ones_like(p.scale, dtype=dtype))


def both(p: Problem) -> dict[bool, Tensor]:
    return {False: bitplane_linear(*p.asymmetric()), True: bipolar_linear(*p.bipolar())}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [24, 100, 301])
def test_planes_hold_the_codes(generator, bits, n):
    codes = some_codes(generator, bits, 3, 5, n)
    planes = bit_planes(codes, bits)
    assert planes.shape == (3, 5, 1, bits, (n + 7) // 8)
    assert torch.equal(plane_codes(planes, n).flatten(-2), codes)
    for i in range(bits):
        assert torch.equal(plane_codes(planes[..., i : i + 1, :], n).flatten(-2), codes >> i & 1)


def test_groups_are_cut_before_they_are_padded(generator):
    codes = some_codes(generator, 3, 4, 60)
    planes = bit_planes(codes, 3, groups=5)
    assert planes.shape == (4, 5, 3, 2)
    for group, part in enumerate(codes.split(12, -1)):
        assert torch.equal(planes[:, group], bit_planes(part, 3)[:, 0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_are_those_of_int64(body, generator, bits):
    """The claim of ABQ-LLM and Bipolar-INT: any widths, with zero points or without zero, any length of a row."""
    # a vector and a tail of words and bytes; the interpreter takes its time
    n, widths = (301, range(1, 9)) if body != "gpu" else (67, [9 - bits])
    for x_bits in widths:
        p = unscaled(problem(generator, bits, x_bits, 2, 3, n))
        for bipolar, y in both(p).items():
            assert torch.equal(y, p.integers(bipolar)[..., 0].float()), (bits, x_bits, bipolar)


@pytest.mark.parametrize(("bits", "x_bits"), WIDTHS)
def test_no_width_is_too_large(bits, x_bits):
    """The largest products, as many as fit: in float64, which no sum of them exceeds, exactly."""
    n = 2**15
    x, w = torch.full((1, n), 2**x_bits - 1, dtype=torch.uint8), torch.full((1, n), 2**bits - 1, dtype=torch.uint8)
    zero, one = torch.zeros(1, dtype=torch.uint8), torch.ones(1)
    product = n * (2**bits - 1) * (2**x_bits - 1)
    planes = bit_planes(x, x_bits), bit_planes(w, bits)
    y = bitplane_linear(planes[0], one, zero, planes[1], one[:, None], zero[:, None], n)
    assert float(y) == float(torch.tensor(product).float())
    assert torch.equal(bipolar_linear(planes[0], one, planes[1], one[:, None], n), y)


# (rows of x, out, in, groups): one and many rows, whole vectors, words, bytes, padding in every group
SHAPES = [
    (1, 40, 256, 1),
    (3, 7, 512, 4),
    (2, 5, 100, 5),
    (40, 33, 128, 1),
    (5, 9, 96, 3),
    (1, 3, 7, 7),
    (2, 2, 1000, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "x_bits"), [(1, 1), (2, 8), (3, 5), (8, 8)], ids=str)
def test_groups_are_scaled_by_themselves(body, generator, shape, bits, x_bits):
    if body == "gpu" and (bits, x_bits) != (3, 5):
        pytest.skip("the interpreter takes its time: one pair of widths for each shape")
    p = problem(generator, bits, x_bits, *shape)
    for bipolar, y in both(p).items():
        exact = p.x_scale.double()[:, None] * (p.integers(bipolar) * p.scale.double()).sum(-1)
        terms = p.x_scale.double()[:, None] * (p.integers(bipolar).abs() * p.scale.double()).sum(-1)
        # a rounding for each sum of a group, each scale, and each addition
        assert ((y - exact).abs() <= 2**-23 * (3 + p.scale.shape[1]) * terms).all()


@needs_numba
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    bits=st.integers(1, 8),
    x_bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    out=st.integers(1, 4),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 600),
)
def test_any_shape(bits, x_bits, rows, out, groups, group_size):
    generator = torch.Generator().manual_seed(group_size)
    p = unscaled(problem(generator, bits, x_bits, rows, out, groups * group_size, groups))
    with backend("cpu"):
        for bipolar, y in both(p).items():
            # the sums of four groups, of integers that float32 may round
            exact = p.integers(bipolar).sum(-1)
            assert ((y.double() - exact).abs() <= 2**-22 * p.integers(bipolar).abs().sum(-1)).all()


@needs_numba
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_plain_torch_serves_other_processors(generator, monkeypatch, rows):
    from tersor.kernels import simd

    p = problem(generator, 2, 4, rows, 7, 100, 5)
    with backend("cpu"):
        fast = both(p)
        monkeypatch.setattr(simd.binding, "get_host_cpu_features", lambda: {"avx2": False})
        simd.available.cache_clear()
        try:
            assert not simd.available()
            for bipolar, y in both(p).items():
                torch.testing.assert_close(y, fast[bipolar], rtol=1e-5, atol=1e-4)
        finally:
            simd.available.cache_clear()


def test_bipolar_products_are_those_with_zero_points_at_half(generator):
    """v = 2 (b - (2^n - 1) / 2): the same integers, once the half is doubled away."""
    p = unscaled(problem(generator, 3, 5, 4, 6, 100))
    zeros = p._replace(x_zero_point=torch.zeros_like(p.x_zero_point), zero_point=torch.zeros_like(p.zero_point))
    plain = bitplane_linear(*zeros.asymmetric())
    x_sum, w_sum = p.x.sum(-1, keepdim=True), p.weight.sum(-1)
    assert torch.equal(bipolar_linear(*p.bipolar()), 4 * plain - 2 * 7 * x_sum - 2 * 31 * w_sum + 100 * 7 * 31)


def test_large_enough_for_several_threads(generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        p = unscaled(problem(generator, 2, 4, 3, 2051, 512))
        for bipolar, y in both(p).items():
            assert torch.equal(y, p.integers(bipolar)[..., 0].float())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_rounded_once_to_the_scales_dtype(body, generator, dtype):
    p = problem(generator, 2, 3, 3, 5, 100, dtype=dtype)
    for bipolar, y in both(p).items():
        exact = p.x_scale.double()[:, None] * (p.integers(bipolar) * p.scale.double()).sum(-1)
        assert y.dtype == dtype
        # Triton's interpreter cuts bfloat16 off
        torch.testing.assert_close(y.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=0)


def test_batch_dimensions_and_strides(body, generator):
    p = problem(generator, 2, 3, 6, 5, 64, 2)
    x, x_scale, x_zero, *others = p.asymmetric()
    expected = bitplane_linear(x, x_scale, x_zero, *others)
    batch = x.unflatten(0, (2, 3)), x_scale.view(2, 3), x_zero.view(2, 3)
    assert torch.equal(bitplane_linear(*batch, *others), expected.view(2, 3, 5))
    assert torch.equal(bitplane_linear(x[0], x_scale[0], x_zero[0], *others), expected[0])
    strided = [t.repeat_interleave(2, 0)[::2] if isinstance(t, Tensor) else t for t in p.asymmetric()]
    assert torch.equal(bitplane_linear(*strided), expected)


@pytest.mark.parametrize("shape", [(1, 5, 100, 5), (2, 5, 301, 1), (40, 5, 31, 1)], ids=str)
def test_nothing_outside_is_read_or_written(body, generator, guarded, shape):
    p = problem(generator, 2, 2, *shape)
    expected = both(p)
    assert torch.equal(bitplane_linear(*(guarded(t) for t in p.asymmetric()[:-1]), p.group_size), expected[False])
    assert torch.equal(bipolar_linear(*(guarded(t) for t in p.bipolar()[:-1]), p.group_size), expected[True])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("rows", [2, 40])
def test_nan_and_infinity_propagate(body, generator, rows):
    p = problem(generator, 2, 3, rows, 5, 100, 5)
    clean = both(p)
    p.scale[2, 1], p.x_scale[1] = float("nan"), float("inf")
    for bipolar, y in both(p).items():
        assert not y[:, 2].isfinite().any()
        assert not y[1].isfinite().any()
        torch.testing.assert_close(y[0, [0, 1, 3, 4]], clean[bipolar][0, [0, 1, 3, 4]], rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "out"), [(0, 5), (3, 0)])
def test_empty_tensors(body, generator, rows, out):
    for y in both(problem(generator, 2, 3, rows, out, 64)).values():
        assert torch.equal(y, torch.zeros(rows, out))


def test_bad_arguments_are_named(generator):
    p = problem(generator, 2, 3, 2, 5, 64, 2)
    names = ("x", "x_scale", "x_zero_point", "weight", "scale", "zero_point", "group_size")

    def expect(error, match, **changed):
        arguments = dict(zip(names, p.asymmetric())) | changed
        with pytest.raises(error, match=f"bitplane_linear: {match}"):
            bitplane_linear(**arguments)

    x, weight = p.planes()
    expect(TypeError, "x must be uint8, got torch.float32; bit_planes makes it", x=x.float())
    expect(TypeError, "weight must be uint8, got torch.int8", weight=weight.view(torch.int8))
    expect(TypeError, "x_scale must be .* got torch.int64", x_scale=p.x_scale.long())
    expect(TypeError, "zero_point must be uint8, got torch.float32", zero_point=p.zero_point.float())
    expect(ValueError, "scale is on meta, but x is on cpu", scale=p.scale.to("meta"))
    expect(ValueError, "x_zero_point is on meta, but x is on cpu", x_zero_point=p.x_zero_point.to("meta"))
    expect(ValueError, r"x must be planes .* got \(2, 1, 3, 4\) and \(5, 2, 2, 4\)", x=x[:, :1])
    expect(ValueError, "x must have 1 to 8 planes, got 9", x=x.repeat(1, 1, 3, 1))
    expect(ValueError, "group_size must be 1 to 32768 and take the 4 bytes of a plane, got 33", group_size=33)
    expect(ValueError, r"x_scale must have one scale per row of x, \(2,\), got \(1,\)", x_scale=p.x_scale[:1])
    expect(ValueError, r"scale must be \(out, groups\) = \(5, 2\), got \(5, 1\)", scale=p.scale[:, :1])
    expect(
        ValueError, r"zero_point must have the shape of scale, \(5, 2\), got \(5, 1\)", zero_point=p.zero_point[:, :1]
    )
    with pytest.raises(TypeError, match="bipolar_linear: weight must be uint8"):
        bipolar_linear(x, p.x_scale, weight.float(), p.scale, 32)
    with pytest.raises(ValueError, match="codes of 2 bits must be 0 to 3, but the largest is 7"):
        bit_planes(torch.tensor([7], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        bit_planes(p.x, 9)
    with pytest.raises(ValueError, match="n = 64 codes cannot be cut into 3 groups"):
        bit_planes(p.x, 3, 3)
    with pytest.raises(TypeError, match="codes must be uint8"):
        bit_planes(p.x.int(), 3)


def test_double_precision_is_the_references(generator):
    p = problem(generator, 8, 8, 2, 5, 500, dtype=torch.float64)
    assert explain(bitplane_linear, *p.asymmetric()).body == "reference"
    for bipolar, y in both(unscaled(p, torch.float64)).items():
        assert torch.equal(y.long(), p.integers(bipolar)[..., 0])


@pytest.mark.parametrize("name", ["x_scale", "scale"])
def test_there_is_no_gradient(generator, name):
    p = problem(generator, 2, 3, 3, 5, 64)
    getattr(p, name).requires_grad_()
    for y in both(p).values():
        with pytest.raises(NotImplementedError, match="has no gradient: detach the scales"):
            y.sum().backward()


def test_registration_is_sound(generator):
    p = problem(generator, 2, 3, 3, 5, 60, 3)
    torch.library.opcheck(torch.ops.tersor.bitplane_linear.default, p.asymmetric())
    torch.library.opcheck(torch.ops.tersor.bipolar_linear.default, p.bipolar())


def test_compiles_into_one_graph(generator):
    p = problem(generator, 2, 3, 3, 5, 64)
    compiled = torch.compile(
        lambda s: bitplane_linear(p.asymmetric()[0], s, *p.asymmetric()[2:]) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(p.x_scale), bitplane_linear(*p.asymmetric()) * 2)
