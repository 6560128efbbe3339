"""GPTQ's files: `qweight` (in bits / 32, out) and `qzeros` (groups, out bits / 32), int32, dense streams of bits.

`scales` are (groups, out); W = (codes - zero_point) * scale as here, with scale = scales.T. With `g_idx`, input channel
i belongs to group g_idx[i]; the channels keep their order.
"""

import torch
from torch import Tensor

from tersor.kernels.bits.stream import pack_stream, unpack_stream


def unpack_weight(qweight: Tensor, bits: int) -> Tensor:
    """Codes (out, in), uint8.

    >>> unpack_weight(pack_weight(torch.tensor([[0, 1, 2, 3] * 8], dtype=torch.uint8), 3), 3)[0, :6]
    tensor([0, 1, 2, 3, 0, 1], dtype=torch.uint8)
    """
    return _unpack(qweight.T, bits)


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """`qweight` of codes (out, in), uint8."""
    return _pack(codes, bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, offset: int = 1) -> Tensor:
    """Zero points (out, groups), uint8.

    Args:
        offset: what was taken from them before they were stored, modulo 2^bits: 1 in the first version of the format
            ("gptq", most files), 0 in the second ("gptq_v2").
    """
    return (_unpack(qzeros, bits).T + offset & 2**bits - 1).contiguous()


def pack_zeros(zero_point: Tensor, bits: int, offset: int = 1) -> Tensor:
    """`qzeros` of zero points (out, groups), uint8."""
    zeros = zero_point.T
    stored = torch.where(zeros <= 2**bits - 1, zeros - offset & 2**bits - 1, zeros)  # too large stays so, for the error
    return _pack(stored, bits)


def _unpack(words: Tensor, bits: int) -> Tensor:
    num_words = words.shape[-1]
    if 1 <= bits <= 8 and 32 * num_words % bits:
        raise ValueError(f"gptq: {num_words} words are no whole number of codes of {bits} bits")
    return unpack_stream(words, bits, 32 * num_words // max(bits, 1), "gptq")


def _pack(codes: Tensor, bits: int) -> Tensor:
    if codes.shape[-1] * bits % 32:
        raise ValueError(f"gptq: {codes.shape[-1]} codes of {bits} bits do not fill words of 32 bits; pad them")
    return pack_stream(codes, bits, "gptq")
