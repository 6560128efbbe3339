"""Where the linears of a transformer are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


class UnsupportedModel(ValueError):
    """The model has no stack of blocks that we recognise."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: of all outermost ModuleLists the one with most weights in linears.

    Raises:
        UnsupportedModel: there is none, or the model has an encoder besides.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} has an encoder and a decoder; only decoders are supported")
    # a vision tower is a stack of blocks too
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder: nn.Module = get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules(prefix=prefix):
        # experts are lists too, inside a block
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inner and _weights(module):
            found[name] = module
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no nn.ModuleList of blocks with nn.Linear layers in them")
    name = max(found, key=lambda name: _weights(found[name]))
    return name, found[name]


def linears(block: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The linears of `block` by name. Subclasses are left out: their forward may do something else."""
    return {name: module for name, module in block.named_modules(prefix=prefix) if type(module) is nn.Linear}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name`, or a module that it lies in, ends with one of the patterns; `*` and `?` stand for anything.

    >>> matches("model.layers.10.mlp.up_proj", ["up_proj"]), matches("model.layers.10.mlp.up_proj", ["layers.1*.mlp"])
    (True, True)
    >>> matches("model.layers.10.mlp.up_proj", ["layers.1"]), matches("model.layers.10.mlp.up_proj", ["proj"])
    (False, False)
    """
    parts = name.split(".")
    # a dot in front: a pattern must not begin within a part of the name
    paths = ["." + ".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, f"*.{pattern}") for path in paths for pattern in patterns)


def _weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in linears(module).values())
