"""Checkpoints: transformers saves and loads quantised models by itself once our quantiser is registered with it."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.quant import grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.recipe import Recipe

FORMAT_VERSION = 1


class UnsupportedCheckpoint(ValueError):
    """The checkpoint was written by a later version, or does not belong to the model."""


class TersorConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: all that is needed to make the layers that the tensors are loaded into.

    Args:
        grids: the grids in use: the class under "type", and its fields.
        layers: name of each quantised layer -> index of its grid in `grids`.
        recipe: what the model was quantised with, to be read by people.

    Raises:
        UnsupportedCheckpoint: it was written by a later version.
    """

    def __init__(
        self,
        grids: list[dict[str, Any]],
        layers: dict[str, int],
        recipe: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise UnsupportedCheckpoint(
                f"the checkpoint has format version {format_version}, but this tersor.quant reads up to {FORMAT_VERSION}: "
                "pip install -U tersor-quant"
            )
        self.quant_method = "tersor"  # pyright: ignore[reportAttributeAccessIssue]  transformers compares it as a string
        self.format_version = format_version
        self.grids, self.layers, self.recipe = grids, layers, recipe


class TersorQuantizer(HfQuantizer):
    """Puts empty quantised layers where the checkpoint's tensors will be loaded."""

    requires_calibration = True  # only checkpoints are loaded: quantising is `quantize`'s work

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        grids = [_grid(fields) for fields in self.quantization_config.grids]
        for name, index in self.quantization_config.layers.items():
            name = _name_in(model, name)
            linear = model.get_submodule(name)
            layer = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                grids[index],
                "meta",
                linear.weight.dtype,
            )
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises UnsupportedCheckpoint where transformers only reports that tensors are missing or do not fit."""
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                _check_buffers(name, layer)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantizedLinear):
                model.set_submodule(name, layer.to_linear(dtype or model.dtype))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


def register() -> None:
    """Make the quantiser known to transformers; doing so again changes nothing."""
    if "tersor" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("tersor")(TersorConfig)
        register_quantizer("tersor")(TersorQuantizer)


def mark(model: Any, recipe: Recipe) -> Any:
    """`model`, as transformers marks a loaded quantised one: `save_pretrained` then writes the config that loads it."""
    layers = {name: module.grid for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    grids = list(dict.fromkeys(layers.values()))
    pieces = {axis: _fields(getattr(recipe, axis)) for axis in ("grid", "solver")}
    config = TersorConfig([_fields(g) for g in grids], {name: grids.index(g) for name, g in layers.items()}, pieces)
    model.config.quantization_config = config
    model.hf_quantizer = TersorQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    return model


def _fields(piece: Any) -> dict[str, Any]:
    return {"type": type(piece).__name__} | asdict(piece)


def _grid(fields: dict[str, Any]) -> grid.IntGrid:
    kind = fields["type"]
    if kind not in grid.__all__:
        raise UnsupportedCheckpoint(
            f"the checkpoint uses a {kind}, which this tersor.quant does not have: pip install -U tersor-quant"
        )
    return getattr(grid, kind)(**{name: value for name, value in fields.items() if name != "type"})


def _name_in(model: Any, name: str) -> str:
    """Name in `model` of the linear that the checkpoint calls `name`: a base model has no prefix of its own."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            if isinstance(model.get_submodule(candidate), nn.Linear):
                return candidate
        except AttributeError:
            continue
    raise UnsupportedCheckpoint(f"the checkpoint quantises {name}, which is no linear of {type(model).__name__}")


def _check_buffers(name: str, layer: QuantizedLinear) -> None:
    for buffer, (shape, dtype) in layer.layout().items():
        tensor = getattr(layer, buffer)
        if tensor.shape != shape or tensor.dtype != dtype:
            raise UnsupportedCheckpoint(
                f"{name}.{buffer} must be {dtype} {shape}, the checkpoint has {tensor.dtype} {tuple(tensor.shape)}"
            )
