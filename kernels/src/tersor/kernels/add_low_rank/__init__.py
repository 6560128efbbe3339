"""The low-rank term beside a compressed linear layer."""

import torch
from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y + (x @ down) @ up, (..., out): what a low-rank residual (EoRA, arXiv:2410.21271) adds to a linear layer's y.

    A function of its own and not a pair of arguments of each linear op: so it follows any of them, and is written once.
    It needs no kernel, either: `torch.addmm` already fuses the sum into the second product, on every device, under
    `torch.compile` and with gradients for all four. Products of rank `rank` cost (in + out) / (in * out) * rank of the
    layer's own. Sums are torch's, in float32 within each product; in half precision x @ down is rounded to x's dtype.

    Args:
        y: (..., out), of x's dtype, as are `down` and `up`.
        x: (..., in).
        down: (in, rank).
        up: (rank, out).

    >>> add_low_rank(torch.ones(2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -1.0]]))
    tensor([ 4., -2.])
    """
    for name, tensor in (("y", y), ("down", down), ("up", up)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"add_low_rank: {name} is {tensor.dtype}, but x is {x.dtype}; use {name}.to(x.dtype)")
        if tensor.device != x.device:
            raise ValueError(f"add_low_rank: {name} is on {tensor.device}, but x is on {x.device}")
    if x.dim() == 0 or down.dim() != 2 or up.dim() != 2 or (x.shape[-1], down.shape[1]) != (down.shape[0], up.shape[0]):
        raise ValueError(
            f"add_low_rank: x must be (..., in), down (in, rank) and up (rank, out), got {tuple(x.shape)}, "
            f"{tuple(down.shape)} and {tuple(up.shape)}"
        )
    if y.shape != (*x.shape[:-1], up.shape[1]):
        raise ValueError(f"add_low_rank: y must be {(*x.shape[:-1], up.shape[1])}, got {tuple(y.shape)}")
    rows = x.shape[:-1].numel()
    return torch.addmm(y.reshape(rows, up.shape[1]), x.reshape(rows, x.shape[-1]) @ down, up).view(y.shape)
