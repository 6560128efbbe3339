"""Checkpoints: transformers saves and loads quantised models by itself once our quantiser is registered with it."""

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear

FORMAT_VERSION = 1


class TersorConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: format version, and the grid of every quantised layer.

    Args:
        layers: full module name -> fields of its `IntGrid`.

    Raises:
        ValueError: the checkpoint was written by a later version.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format version {format_version}, this tersor.quant reads up to {FORMAT_VERSION}: "
                "pip install -U tersor-quant"
            )
        self.quant_method = "tersor"  # pyright: ignore[reportAttributeAccessIssue]  transformers compares it as a string
        self.format_version = format_version
        self.layers = layers


class TersorQuantizer(HfQuantizer):
    """Puts empty quantised layers where the checkpoint's tensors will be loaded."""

    requires_calibration = True  # only checkpoints are loaded: quantising is `quantize`'s work

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, fields in self.quantization_config.layers.items():
            linear = model.get_submodule(name)
            layer = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                IntGrid(**fields),
                "meta",
                linear.weight.dtype,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make the quantiser known to transformers; doing so again changes nothing."""
    if "tersor" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("tersor")(TersorConfig)
        register_quantizer("tersor")(TersorQuantizer)


def mark(model: Any) -> Any:
    """`model`, as transformers marks a loaded quantised one: `save_pretrained` then writes the config that loads it."""
    layers = {
        name: asdict(module.grid) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    config = TersorConfig(layers)
    model.config.quantization_config = config
    model.hf_quantizer = TersorQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    return model
