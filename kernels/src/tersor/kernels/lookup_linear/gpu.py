"""Products with packed weights on the GPU: the kernel of `dequant_matmul`, with a codebook."""

import torch
from torch import Tensor

from tersor.kernels.dequant_matmul.gpu import multiply
from tersor.kernels.dispatch import Declined


def lookup_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero_point: Tensor | None = None,
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    return multiply(x, packed, codebook, scale, zero_point, bits, group_size)
