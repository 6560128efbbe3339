"""AWQ: the scales found are never worse than none, module by module, and fold away."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tersor.quant import Recipe, quantize
from tersor.quant.blocks import linears
from tersor.quant.calibration import batches, block_inputs
from tersor.quant.grid import IntGrid
from tersor.quant.transform import ActScale, BlockTransform, SearchedSmooth
from tersor.quant.transform.fold import rounded

GRID = IntGrid(3, 32)


def inputs_of(model, ids):
    return block_inputs(model, model.model.layers, batches(ids))


@pytest.fixture
def with_outliers(make_model):
    """A model of a kind, three channels of each norm ten times larger."""

    def make(kind: str) -> nn.Module:
        model = make_model(kind)
        for name, parameter in model.named_parameters():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter.data[:3] += 9
        return model

    return make


@torch.no_grad()
def outputs(model, inputs, grid) -> dict[str, Tensor]:
    """What the modules of the first block put out, its linears rounded to `grid`, given their usual inputs."""
    block = model.model.layers[0]
    names = ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")
    calls, found = {}, {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, keywords, name=name: calls.update({name: (arguments, keywords)}), with_kwargs=True
        )
        for name in names
    ]
    inputs[0].run(0, block)
    for handle in handles:
        handle.remove()
    for name in names:
        # attention and MLP are searched with their last linear as it is
        own = [m for n, m in linears(block).items() if n == name or (n.startswith(f"{name}.") and n not in names)]
        with rounded(dict.fromkeys(own), dict.fromkeys(own, grid) if grid else {}):
            arguments, keywords = calls[name]
            output = block.get_submodule(name)(*arguments, **keywords)
        found[name] = output if isinstance(output, Tensor) else output[0]
    return found


@torch.no_grad()
def test_no_module_puts_out_more_error_than_with_rounding_alone(with_outliers, kind, ids, all_on):
    """Attention, o, MLP and down, each given its usual inputs; with outliers, the scales help indeed."""
    model = with_outliers(kind)
    inputs = inputs_of(model, ids)
    exact, nearest = outputs(model, inputs, None), outputs(model, inputs, GRID)
    ActScale().fold_block(model.model.layers[0], inputs, 0, all_on(model, GRID))
    ours = outputs(model, inputs, GRID)
    ratios = [float((ours[n] - exact[n]).square().sum() / (nearest[n] - exact[n]).square().sum()) for n in exact]
    # a scale of the group differs in its last bit once the rows of v and up are divided too
    assert max(ratios) < 1.01
    assert min(ratios) < 0.9


@torch.no_grad()
def test_the_model_stays_the_same(with_outliers, kind, ids, all_on):
    model = with_outliers(kind)
    before, weights = model(ids).logits, copy.deepcopy(model.state_dict())
    inputs = inputs_of(model, ids)
    transform = ActScale(steps=4)
    for index, block in enumerate(model.model.layers):
        transform.check_block(block, inputs, index)
        transform.fold_block(block, inputs, index, all_on(block, GRID))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("transform", [ActScale(4), SearchedSmooth(0.5)], ids=str)
def test_layers_are_rounded_as_they_will_be(transform, make_model, ids):
    """96 inputs of the down projections: no multiple of the 64 that the recipe has, but that is not for them."""
    recipe = Recipe(IntGrid(4, 64), transforms=(transform,))
    kept = quantize(make_model(), recipe, ids, keep=["down_proj"])
    assert type(kept.model.layers[0].mlp.down_proj) is nn.Linear
    other = {f"model.layers.{index}.mlp.down_proj": IntGrid(4, 32) for index in range(2)}
    model = quantize(make_model(), recipe, ids, allocation=other)
    assert model.model.layers[1].mlp.down_proj.scheme.grid == IntGrid(4, 32)


@torch.no_grad()
def test_what_is_kept_is_not_scaled_for_its_rounding(with_outliers, ids):
    """Nothing reads the scaled channels but linears that stay: any scale would be for nothing."""
    model = with_outliers("llama")
    block, before = model.model.layers[0], copy.deepcopy(model.model.layers[0].state_dict())
    others = {linear: GRID for name, linear in linears(block).items() if not name.endswith(("gate_proj", "up_proj"))}
    ActScale(4).fold_block(block, inputs_of(model, ids), 0, others)
    after = block.state_dict()
    norm = "post_attention_layernorm.weight"
    assert torch.equal(after[norm], before[norm])
    assert not torch.equal(after["input_layernorm.weight"], before["input_layernorm.weight"])


def test_no_scale_is_tried_and_the_others_are_centred(generator):
    of_input, of_weight = torch.rand(2, 32, generator=generator) + 0.01
    of_input[3] = of_weight[5] = 0
    first, *others = ActScale(steps=7).candidates(of_input, of_weight)
    assert torch.equal(first, torch.ones(32))
    assert len(others) == 7
    alive = torch.arange(32)[(of_input > 0) & (of_weight > 0)]
    for scale in others:
        assert scale[[3, 5]].tolist() == [1, 1]
        torch.testing.assert_close(scale[alive].max() * scale[alive].min(), torch.tensor(1.0))
    # r = 0: by the weights alone, up to the constant that keeps small ones from exploding
    product = (others[0] * of_weight)[alive]
    torch.testing.assert_close(product, product.mean().expand(30), rtol=0.02, atol=0)


def test_only_dead_channels_leave_nothing_to_try():
    assert len(ActScale().candidates(torch.zeros(4), torch.ones(4))) == 1


@pytest.fixture
def rows(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:20_000], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // 256 * 256].view(-1, 256)


@torch.no_grad()
def test_a_trained_model_loses_less_than_with_rounding_alone(tiny_lm, rows):
    """At 3 bits, on text not seen."""
    calibration, text = rows[:2], rows[-4:]
    log_p = tiny_lm(text).logits.log_softmax(-1)
    divergences = []
    for transforms in ((), (ActScale(steps=5),)):
        model = quantize(copy.deepcopy(tiny_lm), Recipe(IntGrid(3, 64), transforms=transforms), calibration)
        log_q = model(text).logits.log_softmax(-1)
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert divergences[1] < divergences[0]


def test_it_is_a_block_transform():
    assert isinstance(ActScale(), BlockTransform)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        ActScale(0)
