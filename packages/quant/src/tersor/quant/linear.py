"""A linear layer whose weight is stored as packed codes."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.kernels import dequant_matmul, pack_bits, unpack_bits
from tersor.quant.grid import IntGrid, IntParams


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W = grid.decode(codes, params): only codes and parameters are stored, packed.

    Args:
        in_features: as of `nn.Linear`, as are `out_features` and `bias`.
        grid: what the codes mean.
        dtype: of the bias.
    """

    codes: Tensor  # (out, ceil(in / 8) * bits), uint8, packed along `in`
    # float16 scales (out, groups) as the int16 of the same bits: so neither `model.to(dtype)` nor a loader rounds them
    scale_bits: Tensor
    zero_points: Tensor | None  # all (out * groups) of them packed, uint8; None where the grid is symmetric

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        grid: IntGrid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.num_groups = grid.groups(in_features)
        for name, (shape, buffer_dtype) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=buffer_dtype, device=device))
        if grid.symmetric:
            self.register_buffer("zero_points", None)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        # zero points as the kernel takes them, from the first call on: unpacking them costs as much as a small product
        self._unpacked: Tensor | None = None
        # relative squared error of the outputs on the calibration data; known only in the process that quantised
        self.relative_error: float | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, codes: Tensor, params: IntParams, grid: IntGrid) -> Self:
        """The layer that stores `codes` (out, in) in place of the weight of `linear`, with its bias."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, grid, weight.device, weight.dtype)
        layer.codes = pack_bits(codes, grid.bits)
        layer.scale_bits = params.scale.contiguous().view(torch.int16)
        if not grid.symmetric:
            layer.zero_points = pack_bits(params.zero_point.flatten(), grid.bits)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear with the decoded weight."""
        weight = self.dequantize().to(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        linear.weight.data = weight
        if self.bias is not None:
            linear.bias.data = self.bias.data.to(weight.dtype)
        return linear

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer."""
        rows, bits = self.out_features, self.grid.bits
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, -(-self.in_features // 8) * bits), torch.uint8),
            "scale_bits": ((rows, self.num_groups), torch.int16),
        }
        if not self.grid.symmetric:
            layout["zero_points"] = ((-(-rows * self.num_groups // 8) * bits,), torch.uint8)
        return layout

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes stored for the weight: codes, scales and zero points. At work, 2 more bytes are held for each group."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def params(self) -> IntParams:
        """Scales and zero points, as the grid takes them."""
        scale = self.scale_bits.view(torch.float16)
        if self.zero_points is None:
            return IntParams(scale, torch.full_like(scale, 2 ** (self.grid.bits - 1), dtype=torch.uint8))
        return IntParams(scale, unpack_bits(self.zero_points, self.grid.bits, scale.numel()).view_as(scale))

    def dequantize(self) -> Tensor:
        """The weight (out, in) that the codes stand for, float32."""
        return self.grid.decode(unpack_bits(self.codes, self.grid.bits, self.in_features), self.params)

    def forward(self, x: Tensor) -> Tensor:
        if self._unpacked is None:
            # a tensor made in inference mode could not serve a later call that needs gradients
            with torch.inference_mode(False):
                self._unpacked = self.params.zero_point.half()
        scale, group_size = self.scale_bits.view(torch.float16), self.in_features // self.num_groups
        y = dequant_matmul(x, self.codes, scale, self._unpacked, self.grid.bits, group_size)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._unpacked = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpacked = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, grid={self.grid}"
