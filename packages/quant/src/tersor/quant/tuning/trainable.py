"""Quantised layers whose continuous settings are parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.linear import QuantizedLinear


class TrainableLinear(nn.Module):
    """A quantised layer that computes with its decoded weight: what of its grid is continuous has gradients.

    The codes stay unless someone sets `codes`. What stands beside the grid (a compensation, a transform) stays as well.

    Args:
        layer: stays as it is until `store`.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer, self.grid = [layer], layer.scheme.grid  # a list: it is no module of this one
        self.codes, params = self.grid.unpack(layer.stored(), layer.stored_shape)
        self._kind = type(params)
        self._fixed = {name: t for name, t in zip(self._kind._fields, params) if not t.is_floating_point()}
        for name, tensor in zip(self._kind._fields, params):
            if name not in self._fixed:
                self.register_parameter(name, nn.Parameter(tensor.float()))
        self.bias = layer.bias
        # added to the weight: zeros whose gradient is that of the decoded weight
        self.offset: Tensor | None = None

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The grid's parameters, those that are continuous in float32 and with gradients."""
        return self._kind(*(self._fixed.get(name, getattr(self, name, None)) for name in self._kind._fields))

    @property
    def weight(self) -> Tensor:
        """(out, in + padding), float32: what multiplies the transformed input."""
        return self.grid.decode(self.codes, self.params)

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        scheme = layer.scheme
        rounded = h = layer.transformed(x)
        if scheme.activation:
            # straight through: as if nothing had been rounded
            rounded = h + (scheme.activation.quantise(h) - h).detach()
        weight = self.weight if self.offset is None else self.weight + self.offset
        y = F.linear(rounded, weight.to(h.dtype))
        if scheme.compensation:
            y = scheme.compensation.add(y, h, layer.stored("compensation"))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def store(self) -> QuantizedLinear:
        """The layer, with the codes and parameters as they are now, rounded as the grid stores them."""
        (layer,) = self.layer
        layer.replace(self.grid.pack(self.codes, self.rounded()))
        return layer

    def rounded(self) -> Any:
        """The grid's parameters as it stores them."""
        (layer,) = self.layer
        like = self.grid.unpack(layer.stored(), layer.stored_shape)[1]
        return self._kind(*(new.detach().to(old.dtype) for new, old in zip(self.params, like)))


@contextmanager
def trainable(module: nn.Module, kind: type[TrainableLinear] = TrainableLinear) -> Iterator[dict[str, TrainableLinear]]:
    """Inside, the quantised layers of `module` are trainable, by name; afterwards they hold what was learnt."""
    requires_grad = {p: p.requires_grad for p in module.parameters()}
    layers = {name: kind(m) for name, m in module.named_modules() if isinstance(m, QuantizedLinear)}
    module.requires_grad_(False)
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    try:
        with torch.enable_grad():
            yield layers
    finally:
        for name, layer in layers.items():
            module.set_submodule(name, layer.store())
        for parameter, wanted in requires_grad.items():
            parameter.requires_grad_(wanted)
