"""ToMe on a ViT-S/16 of random weights, 224 x 224: what fewer multiply-adds are worth in time.

`pytest packages/tokencomp/benchmarks/bench_tome.py --benchmark-only`; compare `images_per_s` in the extra info.
On a machine with other work, one thread and `--benchmark-timer=time.process_time` count CPU time instead.
No peer is on the package index: the authors' code is not published as a package (and breaks with fused attention), and
`tomesd` serves diffusion U-Nets only. The plain model is the one to beat.
"""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tersor.tokencomp import recipes, slim

BATCH = 8
RECIPES = {
    "plain": None,
    "tome r=8": recipes.tome(r=8),
    "tome r=13": recipes.tome(r=13),
    "random pruning r=13": recipes.random_pruning(r=13),
}


@pytest.fixture(scope="module")
def vit_s():
    torch.manual_seed(0)
    return VisionTransformer(patch_size=16, embed_dim=384, depth=12, num_heads=6).eval()


@pytest.mark.parametrize("name", RECIPES)
def test_throughput(benchmark, vit_s, name):
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    recipe = RECIPES[name]
    session = slim(vit_s, recipe) if recipe else None
    try:
        with torch.inference_mode():
            benchmark.pedantic(vit_s, args=(images,), rounds=7, warmup_rounds=2)
    finally:
        if session:
            session.detach()
    # the fastest round: other work on the machine only ever adds time
    benchmark.extra_info["images_per_s"] = round(BATCH / benchmark.stats.stats.min, 2)
    benchmark.extra_info["macs_ratio"] = round(session.stats.ratio, 3) if session else 1.0
