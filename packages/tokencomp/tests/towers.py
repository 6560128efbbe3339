"""Tiny random models of every supported family, and the way to feed them."""

import torch
from timm.layers.norm import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

NUM_PATCHES = 64
TIMM = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
HF = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}

# name: (how to make it, tokens in front of the patches)
FAMILIES = {
    "timm-cls": (lambda: VisionTransformer(**TIMM), 1),
    "timm-avg": (lambda: VisionTransformer(**TIMM, global_pool="avg"), 1),
    "timm-avg-no-cls": (lambda: VisionTransformer(**TIMM, global_pool="avg", class_token=False), 0),
    "timm-avgmax": (lambda: VisionTransformer(**TIMM, global_pool="avgmax"), 1),
    "timm-map": (lambda: VisionTransformer(**TIMM, global_pool="map"), 1),
    "timm-registers": (
        lambda: VisionTransformer(
            **TIMM, reg_tokens=4, init_values=0.5, qk_norm=True, no_embed_class=True, norm_layer=LayerNorm
        ),
        5,
    ),
    "timm-distilled": (lambda: VisionTransformerDistilled(**TIMM), 2),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**HF, num_labels=10)), 1),
    "vit-eager": (lambda: ViTForImageClassification(ViTConfig(**HF, num_labels=10, attn_implementation="eager")), 1),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**HF, num_labels=10)), 2),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**HF)), 1),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**HF)), 0),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # as initialised, attention is nearly uniform and a wrong one would hardly show
            if any(part in key for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(10)
            if "pos" in key or "cls_token" in key or "class_embedding" in key:
                parameter.normal_()
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    """What the model makes of an image: logits, or the pooled vector."""
    out = model(x)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output
