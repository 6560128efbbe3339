"""Layouts: what must hold for each of them, and what the exponent split claims."""

import numpy as np
import pytest

from tersor.lossless import layout
from tersor.lossless.layout.planes import Form

LAYOUTS = [layout.Raw(), layout.BytePlanes(), layout.ExponentSplit()]
FORMS = [Form(0, 1), *(Form(kind, width) for kind in (1, 2) for width in (2, 4, 8))]


def test_every_layout_is_listed_here():
    pieces = {getattr(layout, name) for name in layout.__all__}
    assert pieces == {type(piece) for piece in LAYOUTS}


@pytest.mark.parametrize("piece", LAYOUTS, ids=str)
def test_layouts_give_valid_forms_for_every_dtype(piece, dtype_bits):
    for dtype, bits in dtype_bits.items():
        form = piece.form(dtype)
        assert form.valid
        assert bits % (8 * form.width) == 0 or form.width == 1
    assert piece.form("a dtype of the future") == Form(0, 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_join_undoes_split_and_leaves_the_input_alone(form, n):
    block = np.random.default_rng(0).integers(0, 256, n * form.width, np.uint8)
    before = block.tobytes()
    block.flags.writeable = False
    planes = form.split(block)
    assert [plane.nbytes for plane in planes] == [n] * form.width
    out = np.full_like(block, 0xAA)
    form.join(planes, out)
    assert out.tobytes() == before == block.tobytes()


@pytest.mark.parametrize("kind", [1, 2])
def test_every_16_bit_pattern_survives(kind):
    words = np.arange(2**16, dtype=np.uint16)  # every NaN payload, both zeros, all subnormals
    form, out = Form(kind, 2), np.empty(2**17, np.uint8)
    form.join(form.split(words.view(np.uint8)), out)
    assert np.array_equal(out.view(np.uint16), words)


def test_plane_0_of_bfloat16_and_float32_is_the_exponent():
    values = np.array([1.5, -1.0, 0.0, -0.0, np.inf, 3e-39, -2.75e8], np.float32)
    exponent = (values.view(np.uint32) >> 23) & 0xFF
    assert layout.ExponentSplit().form("F32").split(values.view(np.uint8))[0].tolist() == exponent.tolist()
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    exponents, sign_mantissa = layout.ExponentSplit().form("BF16").split(bf16.view(np.uint8))
    assert exponents.tolist() == exponent.tolist()
    assert sign_mantissa.tolist() == ((bf16 & 0x7F) << 1 | bf16 >> 15).tolist()
