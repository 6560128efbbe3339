"""Products with decoded weights: for grids that no kernel serves, and for more rows of x than kernels are made for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.quant.grid.protocol import Grid, Stored

# decoded weights held at a time: 1 MiB, which stays in the cache between its decoding and its product
_BLOCK_ELEMENTS = 2**18


def decoded_linear(x: Tensor, decode: Callable[[slice], Tensor], out_features: int) -> Tensor:
    """x W^T (..., out) for x (..., in), in the dtype of x; sums are in float32 (float64 for float64).

    The gradient is that of x only, and decodes again instead of keeping W.

    Args:
        decode: gives rows of W, (rows, in).
    """
    return _DecodedLinear.apply(x, decode, out_features)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Decoded:
    """At run time in the place of `grid`: its weight is decoded once, and held.

    Kernels for packed codes read little memory for few rows of x. For thousands, as calibration has them, a plain product
    takes less time.
    """

    grid: Grid

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor]:
        return (self.grid.decode(*self.grid.unpack(stored, shape)),)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        # as the kernels do it: on CPUs the weight is not rounded to the dtype of x
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[[slice], Tensor], out_features: int) -> Tensor:
        step = max(1, _BLOCK_ELEMENTS // max(1, x.shape[-1]))
        ctx.blocks = [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]
        ctx.decode, ctx.dtype = decode, x.dtype
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        return torch.cat([wide @ decode(rows).T.to(dtype) for rows in ctx.blocks], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].to(torch.promote_types(ctx.dtype, torch.float32))
        total = sum(grad[..., rows] @ ctx.decode(rows).to(grad.dtype) for rows in ctx.blocks)
        return torch.as_tensor(total).to(ctx.dtype), None, None
