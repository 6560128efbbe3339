import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    n = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    planes = [((codes >> b & 1) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8) for b in range(bits)]
    return torch.cat(planes, -1)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    planes = packed.unflatten(-1, (bits, -1))[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (planes << torch.arange(bits, dtype=torch.uint8)[:, None, None]).sum(-3, dtype=torch.uint8).flatten(-2)[..., :n]
