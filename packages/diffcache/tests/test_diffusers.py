"""Transformers, schedulers, pipelines and hooks of diffusers, with tiny random weights: no download."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tersor.diffcache import Recipe, cached, recipes
from tersor.diffcache.granularity import Blocks, SubModules
from tersor.diffcache.trigger import Interval

diffusers = pytest.importorskip("diffusers")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TEXT, POOLED = {"encoder_hidden_states": rand(2, 5, 12)}, {"pooled_projections": rand(2, 10)}
MASK = {"encoder_attention_mask": torch.ones(2, 5)}


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def dit():
    return diffusers.DiTTransformer2DModel(**HEADS, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4)


def sd3():
    return diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,),
    )  # fmt: skip


# name: make, shape of the sample, the other arguments, sites of SubModules (Feeders included), blocks
MODELS = {
    "DiT": (dit, (2, 4, 8, 8), {"class_labels": torch.tensor([1, 2])}, 4, 2),
    "PixArt": (
        lambda: diffusers.PixArtTransformer2DModel(
            **HEADS, in_channels=4, num_layers=2, sample_size=8, cross_attention_dim=16, caption_channels=12,
            norm_num_groups=4,
        ),
        (2, 4, 8, 8), TEXT | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, 6, 2,
    ),
    "SD3": (sd3, (2, 4, 8, 8), TEXT | POOLED, 6, 2),
    "Flux": (flux, (2, 16, 4), TEXT | POOLED | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}, 9, 3),
    "Flux2": (
        lambda: diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, num_attention_heads=2,
            attention_head_dim=16, joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        (2, 16, 4),
        TEXT | {"img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(5, 4), "guidance": torch.ones(2)}, 5, 3,
    ),
    "Wan": (
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ),
        (2, 4, 1, 8, 8), TEXT, 6, 2,
    ),
    "CogVideoX": (
        lambda: diffusers.CogVideoXTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=8,
            sample_height=8, sample_frames=1, patch_size=2, max_text_seq_length=5,
        ),
        (2, 1, 4, 8, 8), TEXT, 4, 2,
    ),
    "CogView4": (
        lambda: diffusers.CogView4Transformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4
        ),
        (2, 4, 8, 8),
        TEXT | {"original_size": torch.full((2, 2), 8), "target_size": torch.full((2, 2), 8),
                "crop_coords": torch.zeros(2, 2)},
        6, 2,  # the MLP runs once for the image, once for the text
    ),
    "LTX": (
        lambda: diffusers.LTXVideoTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=2, caption_channels=12
        ),
        (2, 16, 4), TEXT | MASK | {"num_frames": 1, "height": 4, "width": 4}, 6, 2,
    ),
    "HunyuanVideo": (
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10,
            rope_axes_dim=(2, 4, 4),
        ),
        (2, 4, 1, 8, 8), TEXT | POOLED | MASK | {"guidance": torch.full((2,), 6000.0)}, 9, 3,
    ),
    "Lumina2": (
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=12,
        ),
        (2, 4, 8, 8), TEXT | {"encoder_attention_mask": torch.ones(2, 5).bool()}, 4, 2,
    ),
    "AuraFlow": (
        lambda: diffusers.AuraFlowTransformer2DModel(
            **HEADS, sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
            joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64,
        ),
        (2, 4, 8, 8), TEXT, 7, 3,
    ),
    "Sana": (
        lambda: diffusers.SanaTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
        ),
        (2, 4, 8, 8), TEXT, 6, 2,
    ),
    "QwenImage": (
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
        ),
        (2, 16, 4), TEXT | {"encoder_hidden_states_mask": torch.ones(2, 5).long(), "img_shapes": [(1, 4, 4)] * 2}, 6, 2,
    ),
}  # fmt: skip


def build(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def generate(model, shape, arguments, steps=7):
    x = rand(*shape)
    for i in range(steps):
        t = torch.full((2,), 999.0 - 999 // steps * i)
        v = model(x, timestep=t, **arguments, return_dict=False)[0]
        x = x - v[:, : x.shape[1]] / steps
    return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [SubModules(), Blocks()], ids=lambda piece: type(piece).__name__)
def test_transformers_of_diffusers(name, pieces):
    make, shape, arguments, modules, blocks = MODELS[name]
    model = build(make)
    keys, full = list(model.state_dict()), generate(model, shape, arguments)
    with warnings.catch_warnings(action="ignore"), cached(model, Recipe(pieces, trigger=Interval(1))):
        assert torch.equal(generate(model, shape, arguments), full)
    with cached(model, Recipe(pieces, trigger=Interval(3))) as session:
        outputs = generate(model, shape, arguments)
        assert list(model.state_dict()) == keys
    evaluations = modules if isinstance(pieces, SubModules) else blocks
    assert (session.stats.executed, session.stats.skipped) == (3 * evaluations, 4 * evaluations)
    assert outputs.isfinite().all()
    assert 0 < (outputs - full).norm() < 0.1 * full.norm()
    assert torch.equal(generate(model, shape, arguments), full)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_parallel_blocks_keep_one_tensor_each():
    make, shape, arguments, *_ = MODELS["Flux"]
    model = build(make)
    with cached(model, recipes.fora(2)) as session:
        generate(model, shape, arguments)
        image, text = 2 * 16 * 32 * 4, 2 * 5 * 32 * 4
        double = 2 * (image + text)  # attention and MLP of both streams
        single = (image + text) + 2 * 4  # proj_out; one NaN for the attention, one for proj_mlp
        conditioning = sum(t.nbytes for t in arguments.values())
        assert session.nbytes == double + 2 * single + conditioning


@pytest.mark.parametrize("name", ["DiT", "Flux", "CogView4"])
@pytest.mark.parametrize("pieces", [SubModules(), Blocks()], ids=lambda piece: type(piece).__name__)
def test_macs_skipped_are_those_that_the_flop_counter_of_torch_misses(name, pieces):
    make, shape, arguments, *_ = MODELS[name]
    model = build(make)

    def linear_macs():
        with FlopCounterMode(display=False) as counter:
            generate(model, shape, arguments)
        flops = counter.get_flop_counts()["Global"]
        return (flops.get(torch.ops.aten.addmm, 0) + flops.get(torch.ops.aten.mm, 0)) // 2

    full = linear_macs()
    with cached(model, Recipe(pieces, trigger=Interval(3))) as session:
        saved = full - linear_macs()
    assert session.stats.macs_skipped == saved > 0.3 * full


# -------------------------------------------------------------------------------------------------- schedulers


def test_ddim_loop_with_guidance_in_one_batch():
    model = build(dit)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def sample(steps=10):
        scheduler.set_timesteps(steps)
        x, labels = rand(1, 4, 8, 8), torch.tensor([3, 1000])
        for t in scheduler.timesteps:
            u, c = model(torch.cat([x, x]), timestep=t.expand(2), class_labels=labels).sample.flip(0).chunk(2)
            x = scheduler.step(u + 2.0 * (c - u), t, x).prev_sample
        return x

    full = sample()
    errors = []
    for n in (2, 5):
        with cached(model, recipes.fora(n)) as session:
            outputs = sample()
            assert torch.equal(sample(), outputs)
        errors.append((outputs - full).norm() / full.norm())
        assert session.stats.runs == 2
        assert session.stats.executed == 2 * 4 * -(-10 // n)
    assert 0 < errors[0] < errors[1] < 0.2


def test_solver_with_two_evaluations_per_step():
    model = build(sd3)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()

    def sample():
        scheduler.set_timesteps(6)
        x = rand(2, 4, 8, 8)
        for t in scheduler.timesteps:
            v = model(x, timestep=t.expand(2), **TEXT, **POOLED, return_dict=False)[0]
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x

    full = sample()
    with cached(model, recipes.fora(2)) as session:
        outputs = sample()
        assert torch.equal(sample(), outputs)
    # 11 calls a run: both evaluations at each noise level have features of their own. Computed: the predictor's at
    # steps 0, 2, 4, the corrector's at 1 (its first), 2, 4
    assert session.stats.calls == 22
    assert session.stats.executed == 2 * 6 * (3 + 3)
    assert (outputs - full).norm() < 0.1 * full.norm()


# -------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def pipeline():
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=build(flux),
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, guidance=4.0, steps=6, seed=0, **arguments):
    return pipe(
        prompt_embeds=rand(1, 5, 12), pooled_prompt_embeds=rand(1, 10), height=64, width=64, num_inference_steps=steps,
        negative_prompt_embeds=rand(1, 5, 12, seed=9), negative_pooled_prompt_embeds=rand(1, 10, seed=9),
        true_cfg_scale=guidance, generator=torch.Generator().manual_seed(seed), output_type="latent",
        **arguments,
    ).images  # fmt: skip


def test_pipeline_with_guidance_in_two_calls(pipeline):
    model, full = pipeline.transformer, run(pipeline)
    with warnings.catch_warnings(action="ignore"), cached(model, recipes.fora(1)):
        assert torch.equal(run(pipeline), full)
    with cached(model, recipes.fora(3)) as session:
        outputs = run(pipeline)
        assert torch.equal(run(pipeline), outputs), "the second image is as if it were the first"
    assert session.stats.runs == 2
    assert session.stats.ratio == 1 / 3
    assert 0 < (outputs - full).norm() < 0.1 * full.norm()
    assert "cache_context" not in model.__dict__
    assert torch.equal(run(pipeline), full)


def test_pipeline_never_mixes_the_branches(pipeline):
    """One state for both would hand the conditional attention to the unconditional call."""
    attention, model = [], pipeline.transformer
    handle = model.transformer_blocks[0].attn.register_forward_hook(lambda *call: attention.append(call[2][0].clone()))
    with cached(model, recipes.fora(2)):
        run(pipeline)
    handle.remove()
    cond, uncond = attention[::2], attention[1::2]
    for i in (1, 3, 5):
        assert torch.equal(cond[i], cond[i - 1])
        assert torch.equal(uncond[i], uncond[i - 1])
        assert not torch.equal(cond[i], uncond[i])


def test_interrupted_pipeline_leaves_nothing_for_the_next_image(pipeline):
    class Interrupted(Exception):
        pass

    def stop(pipe, i, t, arguments):
        if i == 1:
            raise Interrupted
        return {}

    model, full = pipeline.transformer, run(pipeline)
    with cached(model, recipes.fora(3)):
        expected = run(pipeline)
        with pytest.raises(Interrupted):
            run(pipeline, seed=1, callback_on_step_end=stop)
        assert torch.equal(run(pipeline), expected)
    assert torch.equal(run(pipeline), full)


def test_step_index_from_the_pipeline_is_used():
    make, shape, arguments, *_ = MODELS["Flux"]
    model = build(make)
    with cached(model, recipes.fora(2)) as session:
        for i in range(4):
            with model.cache_context("cond", step_index=i):
                model(rand(*shape), timestep=torch.tensor([9.0, 5.0]), **arguments)  # a timestep per sample
    assert session.stats.ratio == 0.5


# ------------------------------------------------------------------------------------------------------ hooks


def test_cache_of_diffusers_is_refused(pipeline):
    model = pipeline.transformer
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(RuntimeError, match=r"call disable_cache\(\) first"), cached(model, recipes.fora()):
            pass
    finally:
        model.disable_cache()
    with cached(model, recipes.fora(2)) as session:
        run(pipeline)
    assert session.stats.skipped


def test_hooks_that_were_there_run_at_computed_steps_and_stay():
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    make, shape, arguments, *_ = MODELS["DiT"]
    model, root, inner = build(make), Counting(), Counting()
    site = model.transformer_blocks[1].attn1
    HookRegistry.check_if_exists_or_initialize(model).register_hook(root, "root")
    HookRegistry.check_if_exists_or_initialize(site).register_hook(inner, "inner")
    forwards = model.forward, site.forward
    with cached(model, recipes.fora(2)):
        generate(model, shape, arguments)
    assert (root.calls, inner.calls) == (7, 4)
    assert (model.forward, site.forward) == forwards
    site._diffusers_hook.remove_hook("inner")
    generate(model, shape, arguments)
    assert (root.calls, inner.calls) == (14, 4)


def test_unet_is_refused():
    from tersor.diffcache.errors import UnsupportedModel

    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"module lists are: down_blocks"), cached(unet, recipes.fora()):
        pass
