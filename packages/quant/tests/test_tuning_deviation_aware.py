"""DeviationAware: what its loss weighs, and what it leaves of the levels."""

from dataclasses import replace

import pytest
import torch

from tersor.quant import Recipe, quantize
from tersor.quant.grid import DualBinary, IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import ClipSearch
from tersor.quant.teacher import Teacher, rows
from tersor.quant.tuning import DeviationAware
from tersor.quant.tuning.deviation_aware import RecodedLinear
from tersor.quant.tuning.trainable import trainable

START = Recipe(DualBinary(32), ClipSearch())


@pytest.fixture
def sharp(make_model):
    """A model whose predictions are less alike than those of fresh ones."""

    def make():
        model = make_model()
        model.lm_head.weight.data *= 40
        return model

    return make


def quantized_layers(model) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def test_entropies_are_those_of_the_predictions_and_less_of_fewer(sharp, ids):
    model, data = sharp(), rows([{"input_ids": ids[:3]}])
    with torch.no_grad():
        log_p = model(ids[:3]).logits.double().log_softmax(-1)
        whole = torch.stack(list(Teacher(model, data).entropies(range(3))))
        fewer = torch.stack(list(Teacher(model, data, top_k=8).entropies(range(3))))
    torch.testing.assert_close(whole, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-4)
    assert (fewer <= whole + 1e-4).all()
    assert (fewer > 0).all()


@torch.no_grad()
def test_tokens_count_by_the_cross_entropy_of_teacher_and_student(sharp, ids):
    teacher = Teacher(model := sharp(), rows([{"input_ids": ids[:2]}]))
    log_p = model(ids[:1]).logits[0].log_softmax(-1)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 0.5
    log_q = model(ids[:1]).logits[0].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    doubt = -(log_p.exp() * log_q).sum(-1)
    for gamma in (0.0, 0.5, 1.0):
        expected = ((doubt / doubt.mean()) ** gamma * divergence).double()
        torch.testing.assert_close(DeviationAware(gamma).loss(teacher, [0]), expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_it_lowers_the_divergence_and_leaves_the_levels_in_their_order(sharp, ids):
    teacher = Teacher(sharp(), rows([{"input_ids": ids}]))
    found = []
    for recipe in (START, replace(START, tuning=(DeviationAware(steps=30, batch_size=2, rate=1e-2),))):
        teacher.model = quantize(sharp(), recipe, ids)
        with torch.no_grad():
            found.append(teacher.divergence())
    assert found[1] < 0.95 * found[0]
    for layer in quantized_layers(teacher.model):
        assert layer.original is None
        a1, a2 = DualBinary(32).unpack(layer.stored(), layer.weight_shape)[1]
        assert (a1 > 0).all()
        assert (a2 < 0).all()
        assert (a1 + a2 > 0).all()


def test_codes_follow_the_scales_and_those_stay_where_levels_keep_their_order(make_model, ids):
    seen = {}

    class Astray(DeviationAware):
        def tune(self, model, teacher):
            with trainable(model, RecodedLinear) as layers:
                for name, layer in layers.items():
                    layer.a2.data *= -1 if "mlp" in name else 5
                    seen[name] = layer.original, layer.weight.detach()

    model = quantize(make_model(), replace(START, tuning=(Astray(),)), ids)
    for name, (original, weight) in seen.items():
        layer = model.get_submodule(name)
        codes, (a1, a2) = DualBinary(32).unpack(layer.stored(), layer.weight_shape)
        assert torch.equal(codes, DualBinary(32).encode(original, (a1, a2)))
        assert torch.equal(a2, torch.zeros_like(a2) if "mlp" in name else -a1)
        assert torch.equal(layer.dequantize(), weight)


@torch.no_grad()
def test_any_grid_may_learn_like_that(sharp, ids):
    teacher = Teacher(sharp(), rows([{"input_ids": ids}]))
    found = []
    for tuning in ((), (DeviationAware(steps=20, batch_size=2, top_k=None),)):
        teacher.model = quantize(sharp(), Recipe(IntGrid(2, 32), tuning=tuning), ids)
        with torch.no_grad():
            found.append(teacher.divergence())
    assert found[1] < found[0]


def test_settings_are_checked():
    for setting, value in (("gamma", -1.0), ("steps", 0), ("rate", 0.0)):
        with pytest.raises(ValueError, match=f"{setting} must.*, got {value}"):
            DeviationAware(**{setting: value})
