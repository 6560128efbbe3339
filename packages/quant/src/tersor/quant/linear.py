"""A linear layer whose weight is stored as a grid lays it out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.grid import Buffer, Grid
from tersor.quant.grid.decoded import Decoded
from tersor.quant.scheme import Scheme


class QuantizedLinear(nn.Module):
    """y = activation(h) W^^T + h C^T + bias, h = x T, of what `scheme` says; only what its pieces lay out is stored.

    The grid's buffers have their own names; those of the other pieces follow the axis: `transform_angles`.

    Args:
        in_features: as of `nn.Linear`, as are `out_features` and `bias`.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, (shape, buffer_dtype) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=buffer_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        # what the grid's product takes, from the first call on
        self._prepared: tuple[Any, ...] | None = None
        self._decoded = False
        # relative squared error of the outputs on the calibration data; known only in the process that quantised
        self.relative_error: float | None = None
        # what the grid's codes stand for, (out, in + padding), float32; known only while a recipe with tunings quantises
        self.original: Tensor | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        stored: Mapping[str, Tensor],
        transform: Mapping[str, Tensor] | None = None,
        compensation: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The layer that stores what the pieces of `scheme` packed in place of the weight of `linear`, with its bias."""
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, scheme, weight.device, weight.dtype
        )
        parts = {"": stored, "transform_": transform or {}, "compensation_": compensation or {}}
        for prefix, buffers in parts.items():
            for name, tensor in buffers.items():
                setattr(layer, prefix + name, tensor)
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

    def replace(self, stored: Mapping[str, Tensor]) -> None:
        """Put other buffers in the place of the grid's own."""
        for name, buffer in self.stored().items():
            buffer.copy_(stored[name])
        self._prepared = None

    def layout(self) -> dict[str, Buffer]:
        """Shape and dtype of each buffer."""
        scheme, shape = self.scheme, self.stored_shape
        layout = dict(scheme.grid.layout(*shape))
        if scheme.transform:
            layout |= _prefixed("transform_", scheme.transform.layout(shape[1]))
        if scheme.compensation:
            layout |= _prefixed("compensation_", scheme.compensation.layout(*shape))
        return layout

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(out, in + padding): that of the grid's codes."""
        return self.out_features, self.in_features + self.scheme.padding

    @property
    def nbytes(self) -> int:
        """Bytes stored for the weight. At work, some grids hold more: zero points unpacked, say."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def stored(self, axis: str = "grid") -> dict[str, Tensor]:
        """The buffers of one piece, as it laid them out."""
        if axis == "grid":
            return {name: getattr(self, name) for name in self.scheme.grid.layout(*self.stored_shape)}
        return {name.removeprefix(f"{axis}_"): b for name, b in self.named_buffers() if name.startswith(f"{axis}_")}

    def dequantize(self) -> Tensor:
        """The weight (out, in) that is stored, float32: what multiplies x before anything rounds it."""
        scheme = self.scheme
        weight = scheme.grid.decode(*scheme.grid.unpack(self.stored(), self.stored_shape))
        if scheme.compensation:
            weight = weight + scheme.compensation.decode(self.stored("compensation"), self.stored_shape)
        if scheme.transform:
            weight = scheme.transform.undo(weight, self.stored("transform"))
        return weight[:, : self.in_features] if scheme.padding else weight

    def transformed(self, x: Tensor) -> Tensor:
        """x T (..., in + padding): what is multiplied, before anything rounds it."""
        transform = self.scheme.transform
        x = F.pad(x, (0, self.scheme.padding)) if self.scheme.padding else x
        return transform.apply(x, self.stored("transform")) if transform else x

    def forward(self, x: Tensor) -> Tensor:
        scheme = self.scheme
        # only what a product needs of a grid
        grid: Grid = Decoded(scheme.grid) if self._decoded else scheme.grid  # pyright: ignore[reportAssignmentType]
        if self._prepared is None:
            # a tensor made in inference mode could not serve a later call that needs gradients
            with torch.inference_mode(False):
                if scheme.activation:
                    self._prepared = scheme.activation.prepare(grid, self.stored(), self.stored_shape)
                else:
                    self._prepared = grid.prepare(self.stored(), self.stored_shape)
        h = self.transformed(x)
        if scheme.activation:
            y = scheme.activation.linear(h, grid, *self._prepared)
        else:
            y = grid.linear(h, *self._prepared)
        if scheme.compensation:
            y = scheme.compensation.add(y, h, self.stored("compensation"))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._prepared = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        pieces = {"grid": self.scheme.grid, "transform": self.scheme.transform, "activation": self.scheme.activation}
        pieces["compensation"] = self.scheme.compensation
        pieces["padding"] = self.scheme.padding or None
        said = "".join(f", {axis}={piece}" for axis, piece in pieces.items() if piece is not None)
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}{said}"


def bits_per_weight(model: nn.Module) -> float:
    """Bits stored per weight of the model's quantised layers, everything counted."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    return 8 * sum(layer.nbytes for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)


@contextmanager
def decoded(module: nn.Module) -> Iterator[None]:
    """Inside, the quantised layers of `module` hold their weights decoded, float32, from their next call on.

    What they compute stays the same but for rounding; for thousands of rows it takes less time.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        layer._decoded, layer._prepared = True, None
    try:
        yield
    finally:
        for layer in layers:
            layer._decoded, layer._prepared = False, None


def _prefixed(prefix: str, layout: Mapping[str, Buffer]) -> dict[str, Buffer]:
    return {prefix + name: buffer for name, buffer in layout.items()}
