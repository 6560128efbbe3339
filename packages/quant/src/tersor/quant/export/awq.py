"""AWQ's files, "gemm" version, as vLLM, SGLang and GPTQModel load them: asymmetric grids of 4 bits (arXiv:2306.00978).

The format says nothing of how codes were found: AWQ's scales of channels are folded into the layers before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.kernels.bits import awq as words
from tersor.quant.export.checkpoint import write_checkpoint
from tersor.quant.export.layers import bare, integer_grid, quantized, refuse_unless, unquantized
from tersor.quant.linear import QuantizedLinear

_OF = "AWQ's format"
_OTHER = 'quantise so, or export to "compressed-tensors"'


def check(model: Any, layers: Mapping[str, QuantizedLinear]) -> None:
    first = next(iter(layers.values())).scheme.grid
    for name, layer in layers.items():
        bare(name, layer, _OF)
        grid = integer_grid(name, layer.scheme.grid, _OF)
        refuse_unless(grid.bits == 4 and not grid.symmetric, name, _OF, "4 bits with zero points", grid, _OTHER)
        refuse_unless(grid == first, name, _OF, f"one grid for all layers, {first}", grid, _OTHER)
        refuse_unless(layer.out_features % 8 == 0, name, _OF, "out to be a multiple of 8", layer.out_features, _OTHER)


def write(model: Any, directory: Path, tokenizer: Any) -> None:
    write_checkpoint(model, directory, tokenizer, config(model), tensors)


def tensors(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales`."""
    codes, params = layer.scheme.grid.unpack(layer.stored(), layer.weight_shape)
    return {
        "qweight": words.pack(codes),
        "qzeros": words.pack(params.zero_point),
        "scales": params.scale.T.contiguous(),
    }


def config(model: Any) -> dict[str, Any]:
    """`quantization_config`."""
    name, layer = next(iter(quantized(model).items()))
    grid = integer_grid(name, layer.scheme.grid, _OF)
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": grid.group_size or -1,
        "zero_point": True,
        "modules_to_not_convert": unquantized(model),
    }
