"""compressed-tensors: what vLLM, SGLang and transformers load; written for version 0.20 of the library.

    pack-quantized          integers of 1 to 8 bits; older versions packed 3, 5, 6 and 7 bits differently
    int-quantized           symmetric integers that multiply inputs rounded at run time, W8A8 say
    float-quantized         e4m3 with scales per tensor, row, group of a row, or block
    mxfp4-pack-quantized    MXFP4Grid; the library decodes it in bfloat16
    nvfp4-pack-quantized    NVFP4Grid; likewise

transformers loads asymmetric integers only with `quantization_config=CompressedTensorsConfig(dequantize=True)`. Files
say of inputs only their bits and groups: the library puts their largest magnitude at 127.5 steps of 8 bits, we at 127.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.kernels.bits import compressed_tensors as words
from tersor.quant.activation import IntActivation
from tersor.quant.export.checkpoint import write_checkpoint
from tersor.quant.export.layers import Unexportable, bare, integer_grid, quantized, refuse_unless, unquantized
from tersor.quant.grid import IntGrid
from tersor.quant.grid.float import FloatGrid
from tersor.quant.grid.microscaling import MXFP4Grid, NVFP4Grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme

_OF = "compressed-tensors"
_OTHER = "quantise so, or use save_pretrained"


def check(model: Any, layers: Mapping[str, QuantizedLinear]) -> None:
    for name, layer in layers.items():
        grid, activation = layer.scheme.grid, layer.scheme.activation
        known = isinstance(activation, IntActivation) and activation.clip == 1
        bare(name, layer, _OF, ("transform", "compensation") if known else ("transform", "activation", "compensation"))
        symmetric = isinstance(grid, IntGrid) and grid.symmetric
        refuse_unless(symmetric or not known, name, _OF, f"symmetric integers with {activation}", grid, _OTHER)
        if isinstance(grid, IntGrid):
            integer_grid(name, grid, _OF)
        elif not (
            (isinstance(grid, FloatGrid) and grid.format == "e4m3" and _strategy(grid))
            or (isinstance(grid, MXFP4Grid) and grid.group_size == 32)
            or (isinstance(grid, NVFP4Grid) and grid.group_size == 16)
        ):
            raise Unexportable(
                f"{name}: {_OF} holds IntGrid, FloatGrid of e4m3, MXFP4Grid and NVFP4Grid in their own groups, not {grid}; "
                f"save_pretrained keeps it"
            )


def write(model: Any, directory: Path, tokenizer: Any) -> None:
    write_checkpoint(model, directory, tokenizer, config(model), tensors)


def tensors(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """The codes, packed or as float8, and what scales and shifts them: `weight_scale`, `weight_zero_point`, ...

    Scales of integers and of e4m3 are float32: the library decodes in their dtype, which then rounds nothing.
    """
    grid, shape = layer.scheme.grid, layer.weight_shape
    codes, params = grid.unpack(layer.stored(), shape)
    match grid:
        case IntGrid() if layer.scheme.activation:
            signed = (codes.short() - 2 ** (grid.bits - 1)).to(torch.int8)
            return {"weight": signed, "weight_scale": params.scale.float()}
        case IntGrid():
            stored = {
                "weight_packed": words.pack(codes, grid.bits),
                "weight_scale": params.scale.float(),
                "weight_shape": torch.tensor(shape),
            }
            if not grid.symmetric:
                zero_point = words.pack(params.zero_point.T.contiguous(), grid.bits)
                stored["weight_zero_point"] = zero_point.T.contiguous()
            return stored
        case FloatGrid():
            scale = params.scale if grid.rows else params.scale.view(1)
            return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        case MXFP4Grid():
            return {"weight_packed": _nibbles(codes), "weight_scale": grid.pack_scale(params)["scale_exponents"]}
        case NVFP4Grid():
            return {
                "weight_packed": _nibbles(codes),
                "weight_scale": params.block_scale.to(torch.float8_e4m3fn),
                "weight_global_scale": params.global_scale.view(1),
            }
    raise TypeError(grid)


def config(model: Any) -> dict[str, Any]:
    """`quantization_config`: a group of layers for each scheme."""
    members: dict[Scheme, list[str]] = {}
    for name, layer in quantized(model).items():
        members.setdefault(layer.scheme, []).append(name)
    groups = {}
    for index, (scheme, names) in enumerate(members.items()):
        kind, weights = _weights(scheme.grid)
        activation = scheme.activation
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(members) == 1 else names,
            "weights": weights,
            "input_activations": _inputs(activation) if activation else None,
            "output_activations": None,
            "format": "int-quantized" if activation else kind,
        }
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": unquantized(model),
        "kv_cache_scheme": None,
    }


def _weights(grid: Any) -> tuple[str, dict[str, Any]]:
    """Format, and the library's arguments for weights."""
    form: dict[str, Any] = {"num_bits": grid.bits, "type": "float", "symmetric": True, "dynamic": False}
    match grid:
        case IntGrid():
            return "pack-quantized", form | {"type": "int", "symmetric": grid.symmetric} | _grouped(grid.group_size)
        case FloatGrid():
            return "float-quantized", form | _strategy(grid)
        case MXFP4Grid():
            return "mxfp4-pack-quantized", form | _grouped(32) | {"scale_dtype": "torch.uint8"}
        case NVFP4Grid():
            groups = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
            return "nvfp4-pack-quantized", form | groups
    raise TypeError(grid)


def _grouped(group_size: int | None) -> dict[str, Any]:
    return {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}


def _inputs(activation: Any) -> dict[str, Any]:
    """The library's arguments for inputs."""
    shared = _grouped(activation.group_size) if activation.group_size else {"strategy": "token"}
    return {"num_bits": activation.bits, "type": "int", "symmetric": True, "dynamic": True} | shared


def _strategy(grid: FloatGrid) -> dict[str, Any]:
    """What shares a scale; empty if the library has no word for it."""
    if grid.rows == 1:
        return _grouped(grid.group_size)
    if grid.rows is None:
        return {} if grid.group_size else {"strategy": "tensor"}
    return {"strategy": "block", "block_structure": [grid.rows, grid.group_size]} if grid.group_size else {}


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes in a byte, the one of the even column in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4
