"""The Hadamard transform on the CPU: H_ab = H_a (x) H_b, so that two small matrix products replace one large."""

import torch
from torch import Tensor

from tersor.kernels.hadamard import compute_dtype
from tersor.kernels.hadamard.matrix import factors, hadamard_matrix


def hadamard(x: Tensor, block_size: int | None = None) -> Tensor:
    block = x.shape[-1] if block_size is None else block_size
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    y = x.to(compute_dtype(x)).contiguous()
    rest = 1  # product of the factors to the right
    for order in reversed(factors(block)):
        H = hadamard_matrix(order, y.dtype, y.device)
        y = y.view(-1, order) @ H if rest == 1 else H @ y.view(-1, order, rest)
        rest *= order
    return y.view(x.shape).to(x.dtype, copy=y is x)
