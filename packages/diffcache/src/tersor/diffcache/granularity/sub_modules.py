"""The granularity of FORA: attention and MLP of each block."""

from dataclasses import dataclass

from torch import nn

from tersor.diffcache.errors import UnsupportedModel
from tersor.diffcache.granularity.find import BLOCK_LISTS, find_blocks, is_compiled
from tersor.diffcache.granularity.site import Feeder, Output, Site


@dataclass(frozen=True)
class SubModules:
    """Outputs of the attention and MLP modules of each block, before the gate that follows them.

    Source: arXiv:2407.01425, section 3. Norms, modulation, gates and residual sums are computed at every step, so the
    current step's modulation acts on what is reused.

    A parallel block (Flux's and HunyuanVideo's single blocks) computes out = proj_out([attention, mlp]): there only
    the output of `proj_out` is kept, as in the paper's one tensor per module, and what feeds it is skipped with it.

    Args:
        attention: names that attention modules have as children of a block.
        mlp: names that feed-forward modules have.
        blocks: paths of the block lists in the model; those that it has are used.
    """

    attention: tuple[str, ...] = ("attn", "attn1", "attn2", "self_attn", "cross_attn", "attention", "cross_attention")
    mlp: tuple[str, ...] = ("ff", "ff_context", "ffn", "mlp", "img_mlp", "txt_mlp", "feed_forward")
    blocks: tuple[str, ...] = BLOCK_LISTS

    def __post_init__(self) -> None:
        if not self.attention + self.mlp:
            raise ValueError("attention and mlp are both empty: nothing would be cached; name at least one module")

    def sites(self, model: nn.Module) -> list[Site]:
        """Every attention and MLP module of `model`'s blocks.

        Raises:
            UnsupportedModel: no block has such a module, or the blocks are compiled.
        """
        sites: list[Site] = []
        blocks = find_blocks(model, self.blocks)
        for name, block in blocks:
            if is_compiled(block):
                raise UnsupportedModel(f"{name} is compiled, so its modules cannot be reached; use Blocks() instead")
            children = {child: m for child, m in block.named_children() if child in self.attention + self.mlp}
            branch, joint = (dict(block.named_children()).get(child) for child in ("proj_mlp", "proj_out"))
            if branch is not None and joint is not None and self.attention and self.mlp:
                feeders = {child: m for child, m in children.items() if child in self.attention} | {"proj_mlp": branch}
                sites += [Site(f"{name}.{child}", m, Feeder()) for child, m in feeders.items()]
                sites += [Site(f"{name}.proj_out", joint, Output())]
            else:
                sites += [Site(f"{name}.{child}", m, Output()) for child, m in children.items()]
        for site in sites:
            if site.module._compiled_call_impl is not None:
                raise UnsupportedModel(f"{site.name} was compiled in place; compile it with torch.compile(module)")
        if not sites:
            name, block = blocks[0]
            raise UnsupportedModel(
                f"no block of {type(model).__name__} has a child named {', '.join(self.attention + self.mlp)}; "
                f"{name} ({type(block).__name__}) has: {', '.join(dict(block.named_children())) or 'none'}. "
                "Name them: SubModules(attention=(...), mlp=(...))"
            )
        return sites
