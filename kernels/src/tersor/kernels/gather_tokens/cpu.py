"""Tokens picked on the CPU: whole rows are copied, in plain PyTorch."""

from torch import Tensor

from tersor.kernels.gather_tokens import check_range, flat


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    check_range(x, index)
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).view(*index.shape, *x.shape[2:])
