"""The vision transformers of transformers: ViT, DeiT, and the image towers of CLIP and SigLIP."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.tokencomp.errors import UnsupportedModel
from tersor.tokencomp.site.tower import Latest, Tower, layer_macs

SUPPORTED = (
    "transformers ViTModel, ViTForImageClassification",
    "transformers DeiTModel, DeiTForImageClassification (and WithTeacher)",
    "transformers CLIPVisionModel, CLIPModel",
    "transformers SiglipVisionModel, SiglipModel",
)

_MODELS = "transformers.models."
_NEEDS_ALL = ("ForMaskedImageModeling",)
_PLAIN_MEAN = (
    _MODELS + "clip.modeling_clip.CLIPForImageClassification",
    _MODELS + "siglip.modeling_siglip.SiglipForImageClassification",
)


@dataclass(frozen=True)
class Names:
    """What a family calls its parts."""

    layers: str
    attention: str
    norms: tuple[str, str]
    num_protected: int
    dropout: str | None = None


_VIT = Names("layers", "attention", ("layernorm_before", "layernorm_after"), num_protected=1, dropout="dropout")
_CLIP = Names("encoder.layers", "self_attn", ("layer_norm1", "layer_norm2"), num_protected=1)
_FAMILIES = {
    _MODELS + "vit.modeling_vit.ViTModel": _VIT,
    _MODELS + "deit.modeling_deit.DeiTModel": Names(_VIT.layers, _VIT.attention, _VIT.norms, 2, _VIT.dropout),
    _MODELS + "clip.modeling_clip.CLIPVisionModel": _CLIP,
    _MODELS + "siglip.modeling_siglip.SiglipVisionModel": Names(_CLIP.layers, _CLIP.attention, _CLIP.norms, 0),
}


@dataclass(frozen=True)
class EncoderLayer:
    """x + dropout(attention(norm1(x))), then x + dropout(mlp(norm2(x))); CLIP and SigLIP have no dropout there."""

    module: Any
    names: Names

    def attend(self, x: Tensor, bias: Tensor | None, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        kwargs = dict(kwargs)
        if any(mask is not None for mask in (*args, kwargs.pop("attention_mask", None))):
            raise NotImplementedError("attention masks cannot be combined with slim: tokens lose their places")
        attention, seen = self._attention, []
        mask = None if bias is None else bias[:, None, None, :].to(x.dtype)
        norm = getattr(self.module, self.names.norms[0])
        with attention.k_proj.register_forward_hook(lambda module, inputs, key: seen.append(key)):
            branch, _ = attention(norm(x), attention_mask=mask, **kwargs)
        return x + self._drop(branch), seen[0].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def feed(self, x: Tensor) -> Tensor:
        norm = getattr(self.module, self.names.norms[1])
        return x + self._drop(self.module.mlp(norm(x)))

    def macs(self, tokens_in: int, tokens_out: int) -> int:
        attention = self._attention
        return layer_macs(attention, self.module.mlp, attention.k_proj.out_features, tokens_in, tokens_out)

    def check(self) -> None:
        if self.module.gradient_checkpointing and self.module.training:
            raise NotImplementedError(
                "gradient checkpointing runs layers a second time, when their tokens are gone; "
                "call model.gradient_checkpointing_disable()"
            )
        chosen = self._attention.config._attn_implementation
        if chosen not in ("eager", "sdpa"):
            raise NotImplementedError(
                f"{chosen} attention takes no bias per key; call model.set_attn_implementation('sdpa')"
            )

    @property
    def _attention(self) -> Any:
        return getattr(self.module, self.names.attention)

    def _drop(self, branch: Tensor) -> Tensor:
        return branch if self.names.dropout is None else getattr(self.module, self.names.dropout)(branch)


def tower(module: Any, classes: set[str]) -> Tower | None:
    if any(name.startswith(_MODELS) and name.endswith(_NEEDS_ALL) for name in classes):
        raise UnsupportedModel(f"{type(module).__name__} rebuilds every patch, so no token may go; slim its base model")
    if not classes.isdisjoint(_PLAIN_MEAN):
        raise UnsupportedModel(
            f"{type(module).__name__} takes the plain mean over tokens, which would forget their sizes; "
            "slim its vision_model and pool with `session.state.size`"
        )
    names = next((names for known, names in _FAMILIES.items() if known in classes), None)
    if names is None:
        return None

    def attach_pooling(stack: ExitStack, latest: Latest) -> None:
        head = getattr(module, "head", None)  # SigLIP's attention pooling
        if head is not None:
            hook = head.attention.register_forward_pre_hook(Pooling(latest).bias, with_kwargs=True)
            stack.callback(hook.remove)

    layers = tuple(EncoderLayer(layer, names) for layer in module.get_submodule(names.layers))
    return Tower(layers, names.num_protected, attach_pooling)


@dataclass(frozen=True)
class Pooling:
    """Attention pooling sees the sizes too."""

    latest: Latest

    def bias(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        _, bias = self.latest()
        if bias is None:
            return None
        # MultiheadAttention wants (batch * heads, queries, keys)
        mask = bias[:, None, None, :].expand(-1, module.num_heads, args[0].shape[1], -1)
        return args, kwargs | {"attn_mask": mask.flatten(0, 1).to(args[0].dtype)}
