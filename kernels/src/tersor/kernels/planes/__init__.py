"""Floating-point numbers as byte planes: the exponents, which compress well, apart from the rest, which does not."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_BYTES = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


def word_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integers that a dtype's bits are read as."""
    return _WORDS.get(dtype, torch.uint8)


def _check_dtype(of: str, dtype: torch.dtype) -> None:
    if dtype not in _WORDS and dtype not in _BYTES:
        raise TypeError(
            f"{of}: planes are defined for bfloat16, float16, float32 and types of one byte, not for {dtype}; "
            "use .view(torch.uint8)"
        )


def _check_split(x: Tensor) -> None:
    _check_dtype("plane_split", x.dtype)


def _check_merge(first: Tensor, rest: Tensor, dtype: torch.dtype) -> None:
    _check_dtype("plane_merge", dtype)
    for name, planes in (("first", first), ("rest", rest)):
        if planes.dtype != torch.uint8:
            raise TypeError(f"plane_merge: {name} must be uint8, got {planes.dtype}; plane_split makes it")
    if rest.device != first.device:
        raise ValueError(f"plane_merge: rest is on {rest.device}, but first is on {first.device}")
    if rest.shape != (dtype.itemsize - 1, *first.shape):
        raise ValueError(
            f"plane_merge: rest must hold the {dtype.itemsize - 1} other planes of {dtype}, "
            f"{(dtype.itemsize - 1, *first.shape)}, got {tuple(rest.shape)}"
        )


@op(
    "(Tensor x) -> (Tensor first, Tensor rest)",
    check=_check_split,
    fake=lambda x: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(x.dtype.itemsize - 1, *x.shape, dtype=torch.uint8),
    ),
)
def plane_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Byte planes of `x` (...), its bits rotated left by one: the first (...) and the rest (itemsize - 1, ...).

    The highest bytes come first. The rotation moves the sign to the end, so that the first plane of bfloat16 and float32 is
    the exponent: 2.6 bits of entropy in the 8 of a trained model (arXiv:2411.05239). bfloat16's other plane is
    mantissa << 1 | sign; float16's first plane has the 5 bits of the exponent and 3 of the mantissa. Types of one byte are
    one plane, not rotated.

    Bits are copied, never computed with: NaN payloads, -0 and subnormals survive. There is no gradient.

    >>> plane_split(torch.tensor([1.0, -1.0, 1.5], dtype=torch.bfloat16))
    (tensor([127, 127, 127], dtype=torch.uint8), tensor([[  0,   1, 128]], dtype=torch.uint8))
    """
    dtype = word_dtype(x.dtype)
    bits = 8 * x.dtype.itemsize
    word = x.contiguous().view(dtype)
    if bits == 8:
        return word.clone(), word.new_empty(0, *word.shape)
    rotated = word << 1 | word >> (bits - 1) & 1
    first, *rest = [(rotated >> shift).to(torch.uint8) for shift in range(bits - 8, -1, -8)]
    return first, torch.stack(rest)


@op(
    "(Tensor first, Tensor rest, ScalarType dtype) -> Tensor",
    check=_check_merge,
    fake=lambda first, rest, dtype: first.new_empty(first.shape, dtype=dtype),
)
def plane_merge(first: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor (...) of `dtype` whose planes these are: the inverse of `plane_split`. No gradient (integers).

    >>> first, rest = torch.tensor([127, 127, 127]).byte(), torch.tensor([[0, 1, 128]]).byte()
    >>> plane_merge(first, rest, torch.bfloat16)
    tensor([ 1.0000, -1.0000,  1.5000], dtype=torch.bfloat16)
    """
    bits = 8 * dtype.itemsize
    if bits == 8:
        return first.clone(memory_format=torch.contiguous_format).view(dtype)
    rotated = first.contiguous().to(word_dtype(dtype))
    for plane in rest:
        rotated = rotated << 8 | plane
    # integers are signed: the shift to the right drags the sign along
    return (rotated << (bits - 1) | rotated >> 1 & 2 ** (bits - 1) - 1).view(dtype)
