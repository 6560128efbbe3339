import torch
from torch import Tensor


def hadamard(x: Tensor, block_size: int | None = None) -> Tensor:
    n = block_size or x.shape[-1]
    y = x.unflatten(-1, (-1, n))
    h = 1
    while h < n:
        a, b = y.unflatten(-1, (-1, 2, h)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        h *= 2
    return (y / n**0.5).flatten(-2)
