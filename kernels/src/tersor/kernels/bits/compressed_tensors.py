"""The "pack-quantized" files of compressed-tensors: `weight_packed` (out, ceil(in bits / 32)), int32, a dense stream.

Stored are unsigned codes, the signed values + 2^(bits - 1), which is the zero point of a symmetric grid. Zero points of
other grids (`weight_zero_point`) are packed along `out`: unpack(weight_zero_point.T, bits, out).T. So it is in version
0.20 of the library; at 3, 5, 6 and 7 bits older ones left the highest bits of each word unused. Such files have more
words and are refused.
"""

from torch import Tensor

from tersor.kernels.bits.stream import pack_stream, unpack_stream


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """Codes (rows, n), uint8, of words (rows, ceil(n bits / 32)); for weights n is the second of `weight_shape`."""
    return unpack_stream(words, bits, n, "compressed_tensors")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words of codes (rows, n), uint8.

    >>> import torch
    >>> unpack(pack(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), 3), 3, 5)
    tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    """
    return pack_stream(codes, bits, "compressed_tensors")
