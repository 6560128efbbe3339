"""Whole blocks."""

from dataclasses import dataclass

from torch import nn

from tersor.diffcache.errors import UnsupportedModel
from tersor.diffcache.granularity.find import BLOCK_LISTS, find_blocks
from tersor.diffcache.granularity.site import Residual, Site

# where blocks that return (hidden states, text) have each; a block that is not here returns hidden states alone
_TWO_STREAMS = {
    "FluxTransformerBlock": (1, 0),
    "FluxSingleTransformerBlock": (1, 0),
    "JointTransformerBlock": (1, 0),  # SD3
    "Flux2TransformerBlock": (1, 0),
    "QwenImageTransformerBlock": (1, 0),
    "AuraFlowJointTransformerBlock": (1, 0),
    "CogVideoXBlock": (0, 1),
    "CogView4TransformerBlock": (0, 1),
    "HunyuanVideoTransformerBlock": (0, 1),
    "HunyuanVideoSingleTransformerBlock": (0, 1),
}


@dataclass(frozen=True)
class Blocks:
    """Residual out - in of each block, added to the block's current input where it is reused.

    One tensor per block and stream (`SubModules` keeps two or more), nothing of a skipped block is computed, and
    blocks may be compiled (`torch.compile(block)`). The gates are inside the residual, so they are the old step's.

    Args:
        hidden: position of the hidden states in the tuple that a block returns. None: by the block's class.
        text: position of the text stream; None with `hidden` given: the block returns none.
        blocks: paths of the block lists in the model; those that it has are used.
    """

    hidden: int | None = None
    text: int | None = None
    blocks: tuple[str, ...] = BLOCK_LISTS

    def __post_init__(self) -> None:
        if self.hidden is None and self.text is not None:
            raise ValueError(f"text = {self.text} needs hidden: say where both are")
        if self.hidden is not None and {self.hidden} | ({self.text} - {None}) not in ({0}, {0, 1}):
            raise ValueError(f"hidden = {self.hidden}, text = {self.text}: they are 0 and None, 0 and 1, or 1 and 0")

    def sites(self, model: nn.Module) -> list[Site]:
        """Every block of `model`.

        Raises:
            UnsupportedModel: the model has none of the block lists.
        """
        sites = []
        for name, block in find_blocks(model, self.blocks):
            if block._compiled_call_impl is not None:
                raise UnsupportedModel(f"{name} was compiled in place; compile it with torch.compile(block)")
            kind = type(block._modules.get("_orig_mod", block)).__name__
            hidden, text = _TWO_STREAMS.get(kind, (0, None)) if self.hidden is None else (self.hidden, self.text)
            sites.append(Site(name, block, Residual(hidden, text)))
        return sites
