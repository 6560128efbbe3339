"""Checkpoints: transformers saves and loads quantised models by itself once our quantiser is registered with it."""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.quant.experts import SeparateExperts, separate_experts
from tersor.quant.linear import QuantizedLinear, bits_per_weight
from tersor.quant.recipe import Recipe
from tersor.quant.scheme import Scheme, to_dict

FORMAT_VERSION = 3


class UnsupportedCheckpoint(ValueError):
    """The checkpoint was written by a later version, or does not belong to the model."""


class TersorConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: all that is needed to make the layers that the tensors are loaded into.

    Args:
        schemes: how layers are stored: for each axis the piece's class under "type", and its fields.
        layers: name of each quantised layer -> index of its scheme in `schemes`.
        recipe: what the model was quantised with, and to how many bits, to be read by people.
        experts: names of the modules whose experts have linears of their own.

    Raises:
        UnsupportedCheckpoint: it was written by another version.
    """

    def __init__(
        self,
        schemes: list[dict[str, Any]],
        layers: dict[str, int],
        recipe: dict[str, Any] | None = None,
        experts: Sequence[str] = (),
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            way_out = "pip install -U tersor-quant" if format_version > FORMAT_VERSION else "quantise the model again"
            raise UnsupportedCheckpoint(
                f"the checkpoint has format version {format_version}, but this tersor.quant reads {FORMAT_VERSION}: {way_out}"
            )
        self.quant_method = "tersor"  # pyright: ignore[reportAttributeAccessIssue]  transformers compares it as a string
        self.format_version = format_version
        self.schemes, self.layers, self.recipe, self.experts = schemes, layers, recipe, list(experts)


class TersorQuantizer(HfQuantizer):
    """Puts empty quantised layers where the checkpoint's tensors will be loaded."""

    requires_calibration = True  # only checkpoints are loaded: quantising is `quantize`'s work

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        for name in self.quantization_config.experts:
            separate_experts(model.get_submodule(_name_in(model, name, nn.Module)))
        schemes = [_scheme(pieces) for pieces in self.quantization_config.schemes]
        expected = []
        for stored_name, index in self.quantization_config.layers.items():
            name = _name_in(model, stored_name)
            linear = model.get_submodule(name)
            layer = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                schemes[index],
                "meta",
                linear.weight.dtype,
            )
            model.set_submodule(name, layer)
            expected += [f"{stored_name}.{buffer}" for buffer in layer.layout()]
        _check_complete(expected, checkpoint_files or ())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Those that rename; the others would make one tensor of all experts."""
        if not self.quantization_config.experts:
            return weight_conversions
        return [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises UnsupportedCheckpoint where transformers only reports that tensors do not fit."""
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
    pieces = recipe.scheme.to_dict() | {"solver": to_dict(recipe.solver)}
    pieces["transforms"] = [to_dict(transform) for transform in recipe.transforms]
    pieces["tuning"] = [to_dict(tuning) for tuning in recipe.tuning]
    pieces |= {"allocation": recipe.allocation and repr(recipe.allocation), "pad": recipe.pad}
    pieces |= {"bits_per_weight": bits_per_weight(model), "version": version("tersor-quant")}
    experts = [name for name, module in model.named_modules() if isinstance(module, SeparateExperts)]
    if experts:
        # saved under the names that they have here: what they were loaded from had other tensors
        model._weight_conversions = []
    config = TersorConfig(*schemes_in(model), pieces, experts)
    model.config.quantization_config = config
    model.hf_quantizer = TersorQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    return model


def schemes_in(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """`schemes` and `layers` of `TersorConfig`."""
    layers = {name: module.scheme for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    index = {scheme: i for i, scheme in enumerate(dict.fromkeys(layers.values()))}
    return [scheme.to_dict() for scheme in index], {name: index[scheme] for name, scheme in layers.items()}


def _scheme(pieces: dict[str, Any]) -> Scheme:
    try:
        return Scheme.from_dict(pieces)
    except (KeyError, TypeError) as error:
        raise UnsupportedCheckpoint(
            f"the checkpoint uses {error}, which this tersor.quant does not have: pip install -U tersor-quant"
        ) from error


def _name_in(model: Any, name: str, kind: type[nn.Module] = nn.Linear) -> str:
    """Name in `model` of the linear that the checkpoint calls `name`: a base model has no prefix of its own."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            if isinstance(model.get_submodule(candidate), kind):
                return candidate
        except AttributeError:
            continue
    raise UnsupportedCheckpoint(f"the checkpoint quantises {name}, which is no linear of {type(model).__name__}")


def _check_complete(expected: Sequence[str], files: Sequence[str]) -> None:
    """Raises UnsupportedCheckpoint where transformers only reports that tensors are missing, and takes any bytes for codes.

    Counted by the ends of their names: what stands before, transformers may rename as it loads a model.
    """
    stored: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                stored.update(opened.keys())
    wanted, there = (Counter(name.rpartition(".")[2] for name in names) for names in (expected, stored))
    if stored and (missing := wanted - there):
        example = next(name for name in expected if name not in stored and name.rpartition(".")[2] in missing)
        raise UnsupportedCheckpoint(
            f"the checkpoint lacks {missing.total()} tensors of quantised layers, {example} for one; save or copy it again"
        )


def _check_buffers(name: str, layer: QuantizedLinear) -> None:
    for buffer, (shape, dtype) in layer.layout().items():
        tensor = getattr(layer, buffer)
        if tensor.shape != shape or tensor.dtype != dtype:
            raise UnsupportedCheckpoint(
                f"{name}.{buffer} must be {dtype} {shape}, the checkpoint has {tensor.dtype} {tuple(tensor.shape)}"
            )
