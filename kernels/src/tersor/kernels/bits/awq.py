"""AWQ's files: `qweight` (in, out / 8) and `qzeros` (groups, out / 8), int32, 4 bits, 8 output channels in a word.

Within a word the channels follow each other as 0 2 4 6 1 3 5 7, the lowest bits first (arXiv:2306.00978, the authors'
kernels). `scales` are (groups, out); W = (codes - zero_point) * scale as here, with scale = scales.T.
"""

import torch
from torch import Tensor

from tersor.kernels.bits.stream import pack_stream, unpack_stream

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words: Tensor) -> Tensor:
    """Codes (out, in) of `qweight`, or zero points (out, groups) of `qzeros`, uint8.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32)).flatten()
    tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.uint8)
    """
    codes = unpack_stream(words, 4, 8 * words.shape[-1], "awq")
    place = torch.tensor(_ORDER, device=words.device).argsort()
    return codes.view(len(words), words.shape[1], 8)[..., place].flatten(1).T.contiguous()


def pack(codes: Tensor) -> Tensor:
    """`qweight` of codes (out, in), or `qzeros` of zero points (out, groups), uint8."""
    if len(codes) % 8:
        raise ValueError(f"awq: out = {len(codes)} is not a multiple of 8; pad it")
    order = torch.tensor(_ORDER, device=codes.device)
    return pack_stream(codes.view(len(codes) // 8, 8, -1)[:, order].flatten(0, 1).T, 4, "awq")
