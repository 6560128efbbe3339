"""GPTQ's files, as GPTQModel, vLLM, SGLang and, through optimum, transformers load them (arXiv:2210.17323).

"gptq", the first version of the format, stores zero points less one, which cannot be done to 0: asymmetric grids are
written as "gptq_v2", which stores them as they are.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.kernels.bits import gptq as words
from tersor.quant.export.checkpoint import write_checkpoint
from tersor.quant.export.layers import bare, integer_grid, quantized, refuse_unless, unquantized
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear

_OF = "GPTQ's format"
_OTHER = 'choose a grid that does, or export to "compressed-tensors"'


def check(model: Any, layers: Mapping[str, QuantizedLinear]) -> None:
    slow = []
    for name, layer in layers.items():
        bare(name, layer, _OF)
        grid = integer_grid(name, layer.scheme.grid, _OF)
        refuse_unless(grid.bits in (2, 3, 4, 8), name, _OF, "2, 3, 4 or 8 bits", grid.bits, _OTHER)
        for dim, size in zip(("out", "in"), layer.weight_shape):
            refuse_unless(size % 32 == 0, name, _OF, f"{dim} to be a multiple of 32", size, _OTHER)
        out_features, in_features = layer.weight_shape
        fast = grid.symmetric and grid.bits in (4, 8) and grid.group_size in (None, 32, 64, 128)
        if not fast or in_features % 128 or out_features % 64:
            slow.append(name)
    if slow:
        warnings.warn(
            f"engines on GPUs will take their slower kernels for {len(slow)} layers, {slow[0]} and the like: the fast one "
            f"wants symmetric grids of 4 or 8 bits, groups of 32, 64, 128 or None, in % 128 = 0 and out % 64 = 0",
            stacklevel=3,
        )


def write(model: Any, directory: Path, tokenizer: Any) -> None:
    settings = config(model)
    offset = int(settings["checkpoint_format"] == "gptq")
    write_checkpoint(model, directory, tokenizer, settings, partial(tensors, offset=offset))
    (directory / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tensors(name: str, layer: QuantizedLinear, offset: int) -> dict[str, Tensor]:
    """`qweight`, `qzeros`, `scales` and `g_idx`, the group of each input channel.

    Args:
        offset: what is taken from zero points: 1 for "gptq", 0 for "gptq_v2".
    """
    grid, shape = integer_grid(name, layer.scheme.grid, _OF), layer.weight_shape
    codes, params = grid.unpack(layer.stored(), shape)
    groups = params.scale.shape[1]
    return {
        "qweight": words.pack_weight(codes, grid.bits),
        "qzeros": words.pack_zeros(params.zero_point, grid.bits, offset),
        "scales": params.scale.T.contiguous(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(shape[1] // groups),
    }


def config(model: Any) -> dict[str, Any]:
    """`quantization_config`: the settings of most layers, and under "dynamic" by name those of the others."""
    grids = {name: integer_grid(name, layer.scheme.grid, _OF) for name, layer in quantized(model).items()}
    most = Counter(map(_settings, grids.values())).most_common(1)[0][0]
    others = {f"+:^{re.escape(name)}$": dict(_settings(g)) for name, g in grids.items() if _settings(g) != most}
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    kept = {f"-:^{re.escape(name)}$": {} for name in unquantized(model) if name != head}
    return {
        "quant_method": "gptq",
        **dict(most),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if all(grid.symmetric for grid in grids.values()) else "gptq_v2",
        "pack_dtype": "int32",
        "true_sequential": True,
        **({"dynamic": others | kept} if others or kept else {}),
    }


def _settings(grid: IntGrid) -> tuple[tuple[str, Any], ...]:
    return ("bits", grid.bits), ("group_size", grid.group_size or -1), ("sym", grid.symmetric)
