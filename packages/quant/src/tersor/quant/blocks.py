"""Where the linears of a transformer are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


class UnsupportedModel(ValueError):
    """The model has no stack of blocks that we recognise."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the longest ModuleList of modules of one class with linears in them.

    Raises:
        UnsupportedModel: there is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1 and _has_linear(module[0])
    ]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no nn.ModuleList of blocks with nn.Linear layers in them")
    # the outermost of the longest: experts are lists too, inside a block
    return max(lists, key=lambda entry: (len(entry[1]), -entry[0].count(".")))


def linears(block: nn.Module, prefix: str, keep: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears of `block` by their full name, without those that match a pattern of `keep`."""
    found = {f"{prefix}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in found.items() if not any(fnmatchcase(name, pattern) for pattern in keep)}


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())
