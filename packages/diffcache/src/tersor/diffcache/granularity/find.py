"""Finding the blocks of a model that was written without us in mind."""

from torch import nn

from tersor.diffcache.errors import UnsupportedModel

# diffusers DiT, PixArt, SD3, CogVideoX, LTX, QwenImage; Flux and HunyuanVideo (two lists); AuraFlow; Latte;
# the original DiT code, Wan; Lumina2, Z-Image
BLOCK_LISTS = (
    "transformer_blocks",
    "single_transformer_blocks",
    "joint_transformer_blocks",
    "temporal_transformer_blocks",
    "blocks",
    "layers",
)


def find_blocks(model: nn.Module, lists: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """(name, block) of every block in the `lists` that `model` has, in the order of `lists`.

    Raises:
        UnsupportedModel: the model has none of the lists, or is compiled as a whole.
    """
    if is_compiled(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled as a whole, so its blocks cannot be reached; "
            "attach first and compile the blocks one by one (Blocks() serves compiled blocks)"
        )
    found = [
        (f"{path}.{i}", block)
        for path in lists
        if isinstance(blocks := _get(model, path), nn.ModuleList)
        for i, block in enumerate(blocks)
    ]
    if not found:
        present = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UnsupportedModel(
            f"{type(model).__name__} has none of the block lists {', '.join(lists)}; its module lists are: "
            f"{', '.join(present) or 'none'}. Name the right one: SubModules(blocks=('path.to.list',))"
        )
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` made this module."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _get(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
