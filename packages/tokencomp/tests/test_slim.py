import copy
import warnings

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from towers import FAMILIES, HF, NUM_PATCHES, TIMM, images, make, pooled
from transformers import CLIPConfig, CLIPForImageClassification, CLIPModel, ViTConfig, ViTForMaskedImageModeling

from tersor.tokencomp import recipes, slim
from tersor.tokencomp.errors import UnsupportedModel

families = pytest.mark.parametrize("name", FAMILIES)


def snapshot(model):
    """All that an attachment could leave behind on a module, beside parameters."""
    return {
        name: (sorted(vars(module)), *(len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)))
        for name, module in model.named_modules()
    }


@families
@torch.no_grad()
def test_r_0_is_the_model_itself_bit_by_bit(name):
    model = make(name)
    expected = pooled(model, images())
    with pytest.warns(UserWarning, match="no token was removed from"), slim(model, recipes.tome(r=0)) as session:
        assert torch.equal(pooled(model, images()), expected)
    assert session.stats.ratio == 1.0


@families
@torch.no_grad()
def test_token_counts_and_sizes_in_every_layer(name):
    model, prefix = make(name), FAMILIES[name][1]
    n = prefix + NUM_PATCHES
    sums = []
    with slim(model, recipes.tome(r=(7, 0, 12, 9))) as session:
        for layer in session._tower.layers:
            # a module of the MLP: it runs after the layer's reduction
            norm = getattr(layer.module, "norm2", None) or getattr(
                layer.module, "layernorm_after", getattr(layer.module, "layer_norm2", None)
            )
            norm.register_forward_hook(lambda *_: sums.append(session.state.size.sum(1).tolist()))
        pooled(model, images())
    assert session.stats.tokens == (n, n - 7, n - 7, n - 19, n - 28)
    assert sums == [[n] * 3] * 4
    assert [count.removed for count in session.stats.layers] == [7, 0, 12, 9]


def duplicated(model, name):
    """The model's own patches twice, side by side, from the first layer on."""
    prefix = FAMILIES[name][1]

    def twice(module, args):
        x = args[0]
        return (torch.cat([x[:, :prefix], x[:, prefix:].repeat_interleave(2, 1)], 1), *args[1:])

    layers = getattr(model, "blocks", None)
    if layers is None:
        layers = next(module for key, module in model.named_modules() if key.endswith("layers"))
    layers[0].register_forward_pre_hook(twice)
    return model


@families
@pytest.mark.parametrize("pairs", [NUM_PATCHES, 20])
@torch.no_grad()
def test_merging_exact_copies_changes_nothing_with_proportional_attention(name, pairs):
    model = duplicated(make(name).double(), name)
    x = images().double()
    expected = pooled(model, x)
    # every patch has its copy on the other side of the bipartition
    with slim(model, recipes.tome(r=(pairs, 0, 0, 0))) as session:
        out = pooled(model, x)
    assert session.stats.tokens[1] == FAMILIES[name][1] + 2 * NUM_PATCHES - pairs
    error = (out - expected).abs().max() / expected.abs().max()
    # sizes and matching are float32, the rest is float64: log 2 is rounded to 2^-24
    assert error < 1e-6

    # when sizes are forgotten, copies count half: the identity is no property of the data
    with slim(model, recipes.tome(r=(pairs, 0, 0, 0), proportional=False)):
        wrong = pooled(model, x)
    if FAMILIES[name][1] or pairs < NUM_PATCHES:  # when all tokens are pairs, all weights halve alike
        assert (wrong - expected).abs().max() / expected.abs().max() > 100 * error


@families
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(name):
    model = make(name).double()
    x = images(4).double()
    with slim(model, recipes.tome(r=8)):
        batch = pooled(model, x)
        alone = torch.cat([pooled(model, image[None]) for image in x])
    # float64 with float32 sizes: the same matches, so only rounding of other batch shapes differs
    torch.testing.assert_close(batch, alone, rtol=1e-6, atol=1e-8)


@families
@torch.no_grad()
def test_detach_gives_the_model_back(name):
    model = make(name)
    expected, before, keys = pooled(model, images()), snapshot(model), list(model.state_dict())
    session = slim(model, recipes.tome(r=8))
    assert list(model.state_dict()) == keys
    assert not torch.equal(pooled(model, images()), expected)
    session.detach()
    session.detach()
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(pooled(model, images()), expected)


@torch.no_grad()
def test_detach_after_an_exception_inside_a_layer():
    model = make("vit")
    before, expected = snapshot(model), pooled(model, images())

    def fail(module, args):
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), slim(model, recipes.tome(r=8)):  # noqa: PT012
        model.vit.layers[2].mlp.register_forward_pre_hook(fail)
        model(images())
    model.vit.layers[2].mlp._forward_pre_hooks.clear()
    assert snapshot(model) == before
    assert torch.equal(pooled(model, images()), expected)


@torch.no_grad()
def test_a_forward_that_was_interrupted_does_not_spoil_the_next():
    model = make("timm-cls")
    with slim(model, recipes.tome(r=8)) as session:
        expected = model(images())
        handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(1))
        handle.remove()
        assert torch.equal(model(images()), expected)
        assert session.stats.tokens == (65, 57, 49, 41, 33)


@families
def test_gradients_flow_through_merged_tokens(name):
    model = make(name).train()
    x = images().requires_grad_()
    with slim(model, recipes.tome(r=8)):
        pooled(model, x).square().mean().backward()
    assert x.grad is not None
    # every pixel of every patch was used, whatever its patch was merged into
    assert (x.grad.unflatten(2, (8, 4)).unflatten(4, (8, 4)).abs().sum((1, 3, 5)) > 0).all()
    unused = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [key for key in unused if "layers" in key or "blocks" in key]


def test_gradients_are_those_of_finite_differences():
    model = make("timm-cls").double()
    x = images(1).double().requires_grad_()
    with slim(model, recipes.tome(r=8)):
        gradient = torch.autograd.grad(model(x)[0, 0], x)[0]
        step = torch.zeros_like(x)
        step[0, 1, 13, 7] = 1e-6
        with torch.no_grad():
            difference = (model(x + step)[0, 0] - model(x - step)[0, 0]) / 2e-6
    torch.testing.assert_close(gradient[0, 1, 13, 7], difference, rtol=1e-4, atol=1e-8)


@families
@torch.no_grad()
def test_bfloat16(name):
    model = make(name).bfloat16()
    with slim(model, recipes.tome(r=8)) as session:
        out = pooled(model, images().bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert session.state.size.sum(1).tolist() == [FAMILIES[name][1] + NUM_PATCHES] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-cls", "timm-avg", "timm-map", "vit", "siglip"])
def test_autocast(name):
    model = make(name)
    with slim(model, recipes.tome(r=8)), torch.autocast("cpu", torch.bfloat16):
        assert pooled(model, images()).isfinite().all()


@torch.no_grad()
def test_more_than_half_is_clamped_and_said_once():
    model = make("timm-cls")
    with slim(model, recipes.tome(r=30)) as session:
        with pytest.warns(UserWarning, match=r"asks for 30 of 35 tokens in layer 1, 17 can go"):
            model(images())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images())
    # (tokens - 1) // 2 from the second layer on, as the paper has it
    assert session.stats.tokens == (65, 35, 18, 10, 6)
    assert session.stats.clamped == (1, 2, 3)


def test_a_session_without_a_forward_says_so():
    with pytest.warns(UserWarning, match="detached before any forward"), slim(make("vit"), recipes.tome()):
        pass


@torch.no_grad()
def test_macs_are_those_of_the_matrix_products():
    model = make("timm-cls")
    n, c = 65, 32
    with slim(model, recipes.tome(r=8)) as session:
        model(images(2))
    dense = 4 * n * c**2 + 2 * n**2 * c + 8 * n * c**2
    first = 4 * n * c**2 + 2 * n**2 * c + 8 * (n - 8) * c**2 + 32 * 32 * 16
    assert session.stats.layers[0].dense_macs == dense
    assert session.stats.layers[0].macs == first
    assert session.stats.dense_macs == 2 * 4 * dense
    assert session.stats.macs == 2 * sum(count.macs for count in session.stats.layers)
    assert session.stats.images == 2
    assert "65 -> 33 tokens" in str(session.stats)


@torch.no_grad()
def test_mean_pooling_counts_members():
    model = make("timm-avg")
    x = images()
    with slim(model, recipes.tome(r=8)) as session:
        tokens = model.forward_features(x)
        logits = model.forward_head(tokens)
    unmerged = session.state.unmerge(tokens)
    # float32 sums in another order
    torch.testing.assert_close(logits, model.forward_head(unmerged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, model.forward_head(tokens), rtol=1e-3)


@torch.no_grad()
def test_unmerge_restores_the_grid():
    model = make("clip")
    with slim(model, recipes.tome(r=8)) as session:
        out = model(images(), output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [65, 57, 49, 41, 33]
    assert session.state.unmerge(out.last_hidden_state).shape == (3, 65, 32)


@torch.no_grad()
def test_clip_is_slimmed_in_its_image_tower_only():
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(vision_config=HF, text_config=text, projection_dim=16)).eval()
    ids = torch.tensor([[1, 5, 7, 2]])
    expected = model.get_text_features(ids).pooler_output
    with slim(model, recipes.tome(r=8)) as session:
        model(input_ids=ids, pixel_values=images())
        assert torch.equal(model.get_text_features(ids).pooler_output, expected)
    assert session.stats.tokens[-1] == 33


@torch.no_grad()
def test_a_deep_copy_runs_on_its_own_weights():
    model = make("timm-avg")
    with slim(model, recipes.tome(r=8)) as session:
        twin = copy.deepcopy(model)
        expected = model(images())
        for parameter in model.parameters():
            parameter.zero_()
        images_before = session.stats.images
        assert torch.equal(twin(images()), expected)
        assert session.stats.images == images_before


def test_models_without_a_tower_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="Linear has no tower to slim; supported: timm VisionTransformer"):
        slim(torch.nn.Linear(2, 2), recipes.tome())
    for block in (ResPostBlock, ParallelScalingBlock):
        with pytest.raises(UnsupportedModel, match=f"blocks.0: block {block.__name__} is not timm's plain one"):
            slim(VisionTransformer(**TIMM, block_fn=block), recipes.tome())
    with pytest.raises(UnsupportedModel, match="rebuilds every patch"):
        slim(ViTForMaskedImageModeling(ViTConfig(**HF)), recipes.tome())
    with pytest.raises(UnsupportedModel, match="takes the plain mean over tokens"):
        slim(CLIPForImageClassification(CLIPConfig(vision_config=HF)), recipes.tome())
    with pytest.raises(UnsupportedModel, match=r"ModuleList has several towers \(0, 1\)"):
        slim(torch.nn.ModuleList([make("timm-cls"), make("timm-cls")]), recipes.tome())
    model = make("timm-cls")
    model.global_pool = "prr"
    with pytest.raises(NotImplementedError, match="global_pool='prr'"):
        slim(model, recipes.tome())


def test_a_slimmed_model_is_not_slimmed_again():
    model = make("vit")
    session = slim(model, recipes.tome(r=8))
    with pytest.raises(ValueError, match="layer 0: the forward of ViTLayer is replaced already"):
        slim(model, recipes.tome(r=8))
    with torch.no_grad():
        model(images())
    session.detach()
    assert snapshot(model) == snapshot(make("vit"))


def test_a_later_attachment_must_go_first():
    model = make("vit")
    session = slim(model, recipes.tome(r=8))
    model.vit.layers[1].forward = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="layer 1: something replaced the slimmed forward"):
        session.detach()


def test_what_cannot_be_combined_says_what_to_do():
    model = make("timm-cls")
    with slim(model, recipes.tome(r=8)):
        with torch.no_grad():
            model(images())
        with pytest.raises(NotImplementedError, match="attention masks"):
            model(images(), attn_mask=torch.zeros(65, 65))
        model.set_grad_checkpointing(True)
        with pytest.raises(NotImplementedError, match=r"set_grad_checkpointing\(False\)"):
            model(images())
    model = make("vit")
    with slim(model, recipes.tome(r=8)):
        with torch.no_grad():
            model(images())
        model.gradient_checkpointing_enable()
        with pytest.raises(NotImplementedError, match="gradient_checkpointing_disable"):
            model.train()(images())
        model.eval()
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('sdpa'\)"):
            model(images())
