"""FORA against the model alone, fewer steps, and the caches of diffusers.

    pytest packages/diffcache/benchmarks/bench_fora.py --benchmark-only -s --benchmark-timer=time.process_time

Two models for two questions. Time and counts: a Flux of diffusers with random weights, large enough that its blocks
outweigh Python; its errors say nothing about quality. Quality: a toy DiT that was trained, in the table printed last,
with the rows that a cache must beat: fewer steps of the same and of a second-order solver.
"""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tersor.diffcache import Recipe, cached, recipes
from tersor.diffcache.granularity import Blocks
from tersor.diffcache.testing import ToyDiT, euler, trained_toy
from tersor.diffcache.trigger import Interval

STEPS = 20


@pytest.fixture(scope="module")
def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, num_attention_heads=4, attention_head_dim=64,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip


def sample(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 256, 16, generator=generator)
    arguments = {
        "encoder_hidden_states": torch.randn(1, 32, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)),
        "txt_ids": torch.zeros(32, 3),
    }
    for i in range(STEPS):
        with model.cache_context("cond"):
            x = x - model(x, timestep=torch.tensor([1 - i / STEPS]), **arguments, return_dict=False)[0] / STEPS
    return x


@contextlib.contextmanager
def diffusers_cache(model, config):
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()


def taylorseer_of_order_0(model):
    """The diffusers hook nearest to FORA: reuse (order 0) of attention and MLP outputs at interval 3."""
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=1,
        max_order=0,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[
            r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
            r"single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)",
        ],
    )
    return diffusers_cache(model, config)


def pab(model):
    """Pyramid attention broadcast: attention only, every third call."""
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    return diffusers_cache(model, config)


CACHES = {
    "none": lambda model: contextlib.nullcontext(),
    "fora(3)": lambda model: cached(model, recipes.fora(3)),
    "Blocks, Interval(3)": lambda model: cached(model, Recipe(Blocks(), trigger=Interval(3))),
    "diffusers TaylorSeer, order 0": taylorseer_of_order_0,
    "diffusers PAB, attention": pab,
}


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_time_of_20_steps(benchmark, flux, name):
    full = sample(flux)

    def generate():
        with CACHES[name](flux):
            return sample(flux)

    with FlopCounterMode(display=False) as counter:
        outputs = generate()
    benchmark.extra_info["GMAC"] = round(counter.get_total_flops() / 2e9, 2)
    benchmark.extra_info["error"] = f"{((outputs - full).norm() / full.norm()).item():.1e}"
    benchmark.pedantic(generate, rounds=5, warmup_rounds=1)
    print(f"\n{name}: {benchmark.extra_info}")


# ------------------------------------------------------------------------------------------------------- quality


def second_order(model: ToyDiT, noise, labels, steps):
    """Two-step Adams-Bashforth on v: x += h (3/2 v_i - 1/2 v_{i-1})."""
    x, previous = noise, None
    for i in range(steps):
        v = model(x, torch.full((len(x),), 1 - i / steps), labels)
        x = x - (v if previous is None else 1.5 * v - 0.5 * previous) / steps
        previous = v
    return x


@torch.no_grad()
def test_quality_at_equal_evaluations(benchmark):
    model = benchmark.pedantic(trained_toy, args=(1000,), rounds=1)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(64) % 4
    steps = 48
    full = euler(model, noise, labels, steps)
    truth = second_order(model, noise, labels, 400)

    def psnr(x, reference):
        return 10 * torch.log10(4 / (x - reference).square().mean()).item()

    print(f"\nPSNR to {steps} Euler steps / to 400 second-order steps; the {steps} steps: {psnr(full, truth):.1f}")
    for n in (2, 3, 4, 6):
        rows = {"Euler": euler(model, noise, labels, steps // n)}
        rows["second order"] = second_order(model, noise, labels, steps // n)
        for name, recipe in (("fora", recipes.fora(n)), ("Blocks", Recipe(Blocks(), trigger=Interval(n)))):
            with cached(model, recipe):
                rows[name] = euler(model, noise, labels, steps)
        cells = [f"{name} {psnr(x, full):.1f} / {psnr(x, truth):.1f}" for name, x in rows.items()]
        print(f"{steps // n} evaluations: " + ", ".join(cells))
