"""Codes as one dense stream of bits, the lowest first: 8 codes in `bits` bytes. Other libraries' files hold them so."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_stream(codes: Tensor, bits: int, of: str) -> Tensor:
    """Words (rows, ceil(n bits / 32)), int32, of `codes` (rows, n), uint8; `of` names the format in errors.

    >>> hex(pack_stream(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 4, "example").item())
    '0x7654321'
    """
    _check(codes, torch.uint8, "codes", bits, of)
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"{of}: codes of {bits} bits must be 0 to {2**bits - 1}, but the largest is {largest}")
    rows, n = codes.shape
    num_words = -(-n * bits // 32)
    eights = pad(codes, (0, -n % 8)).view(rows, -(-n // 8), 8).long()
    shifts = torch.arange(8, device=codes.device) * bits
    # 8 codes have at most 64 bits: the lowest bytes of one integer
    eights = (eights << shifts).sum(-1, keepdim=True).view(torch.uint8)[..., :bits].flatten(1)
    words = pad(eights, (0, 4 * num_words - eights.shape[1]))
    return words.flatten().view(torch.int32).view(rows, num_words)


def unpack_stream(words: Tensor, bits: int, n: int, of: str) -> Tensor:
    """Codes (rows, n), uint8, of `words` (rows, ceil(n bits / 32)), int32."""
    _check(words, torch.int32, "words", bits, of)
    rows, num_words = words.shape
    if num_words != -(-n * bits // 32):
        raise ValueError(
            f"{of}: {n} codes of {bits} bits take {-(-n * bits // 32)} words, but there are {num_words} in a row"
        )
    eights = -(-n // 8)
    stream = words.flatten().view(torch.uint8).view(rows, 4 * num_words)
    stream = pad(stream, (0, eights * bits - 4 * num_words)).view(rows, eights, bits)
    stream = pad(stream, (0, 8 - bits)).flatten().view(torch.int64).view(rows, eights, 1)
    shifts = torch.arange(8, device=words.device) * bits
    return (stream >> shifts & 2**bits - 1).to(torch.uint8).flatten(1)[:, :n].contiguous()


def _check(tensor: Tensor, dtype: torch.dtype, name: str, bits: int, of: str) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{of}: bits must be 1 to 8, got {bits}")
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise TypeError(f"{of}: {name} must be {dtype} with two dimensions, got {tensor.dtype} {tuple(tensor.shape)}")
