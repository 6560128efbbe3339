"""timm's VisionTransformer, and all that is built from its plain blocks: ViT, DeiT (distilled too), DINO, registers."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.tokencomp.errors import UnsupportedModel
from tersor.tokencomp.site.tower import Latest, Tower, layer_macs

SUPPORTED = ("timm VisionTransformer with plain blocks",)

_BLOCK = ("timm.models.vision_transformer", "Block.forward")
_ATTENTION = ("timm.layers.attention", "Attention.forward")


@dataclass(frozen=True)
class BlockLayer:
    """x + drop_path1(ls1(attn(norm1(x)))), then x + drop_path2(ls2(mlp(norm2(x))))."""

    module: Any
    vit: Any

    def attend(self, x: Tensor, bias: Tensor | None, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            raise NotImplementedError("attention masks cannot be combined with slim: tokens lose their places")
        block, seen = self.module, []
        mask = None if bias is None else bias[:, None, None, :].to(x.dtype)
        with block.attn.k_norm.register_forward_hook(lambda module, inputs, key: seen.append(key)):
            branch = block.attn(block.norm1(x), attn_mask=mask)
        return x + block.drop_path1(block.ls1(branch)), seen[0]

    def feed(self, x: Tensor) -> Tensor:
        block = self.module
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def macs(self, tokens_in: int, tokens_out: int) -> int:
        attn = self.module.attn
        return layer_macs(attn, self.module.mlp, attn.num_heads * attn.head_dim, tokens_in, tokens_out)

    def check(self) -> None:
        if self.vit.grad_checkpointing:
            raise NotImplementedError(
                "gradient checkpointing runs layers a second time, when their tokens are gone; "
                "call model.set_grad_checkpointing(False)"
            )


def tower(module: Any, classes: set[str]) -> Tower | None:
    if "timm.models.vision_transformer.VisionTransformer" not in classes:
        return None
    for i, block in enumerate(module.blocks):
        for name, part, known in (("block", block, _BLOCK), ("attention", getattr(block, "attn", block), _ATTENTION)):
            forward = type(part).forward
            if (forward.__module__, forward.__qualname__) != known:
                raise UnsupportedModel(
                    f"blocks.{i}: {name} {type(part).__name__} is not timm's plain one; "
                    f"supported: {'; '.join(SUPPORTED)}"
                )
    if module.global_pool == "prr":
        raise NotImplementedError("global_pool='prr' attends between patches without sizes; reset_classifier to 'avg'")

    def attach_pooling(stack: ExitStack, latest: Latest) -> None:
        pool = Pooling(module, latest)
        if module.attn_pool is not None:
            stack.callback(module.attn_pool.register_forward_pre_hook(pool.bias, with_kwargs=True).remove)
        else:
            module.pool = pool.pool
            stack.callback(delattr, module, "pool")

    layers = tuple(BlockLayer(block, module) for block in module.blocks)
    return Tower(layers, module.num_prefix_tokens, attach_pooling)


@dataclass(frozen=True)
class Pooling:
    """timm's pooling, with each token counted by its size; the same as pooling after `unmerge`.

    As in the authors' code for MAE, which is where ToMe meets mean pooling.
    """

    vit: Any
    latest: Latest

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = self.vit.global_pool if pool_type is None else pool_type
        own = type(self.vit).pool
        if pool_type not in ("avg", "avgmax"):
            return own(self.vit, x, pool_type)
        state, _ = self.latest()
        start = 0 if self.vit.pool_include_prefix else self.vit.num_prefix_tokens
        size = state.size[:, start:]
        # the plain mean of rows that are weighted to a mean of 1
        weight = (size * size.shape[1] / size.sum(1, keepdim=True)).to(x.dtype)
        mean = (x[:, start:] * weight[..., None]).mean(1)
        return mean if pool_type == "avg" else 0.5 * (own(self.vit, x, "max") + mean)

    def bias(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Attention pooling sees the sizes too."""
        _, bias = self.latest()
        if bias is None:
            return None
        x = args[0]
        start = 0 if self.vit.pool_include_prefix else self.vit.num_prefix_tokens
        return args, kwargs | {"attn_mask": bias[:, None, None, start:].to(x.dtype)}
