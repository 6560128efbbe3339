"""PTQ1.61 and DB-LLM on a trained model: the order that they claim."""

import copy
from dataclasses import replace

import pytest
import torch

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.grid import BinaryGrid
from tersor.quant.teacher import Teacher, rows
from tersor.quant.tuning import DeviationAware

# tests of seconds: all blocks but two
KEEP = ["layers.0", "layers.1", "layers.2", "layers.3"]


@pytest.fixture
def data(held_out_text, tiny_lm_tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 64 tokens, to learn from and others."""
    ids = tiny_lm_tokenizer(held_out_text[:30_000], return_tensors="pt").input_ids[0]
    every = ids[: 56 * 64].view(-1, 64)
    return every[:40], every[40:]


@torch.no_grad()
def divergence(teacher: Teacher, model) -> float:
    teacher.model = model
    return teacher.divergence()


@torch.no_grad()
def test_learned_scales_cut_the_error_of_a_block_by_a_third(tiny_lm, data):
    """On text that was not learnt from; in blocks with random weights, all of one size, scales have little to learn."""
    calibration, text = list(data[0].split(4)), data[1]
    dense, outputs = tiny_lm(text, output_hidden_states=True).hidden_states[2], []
    ptq = recipes.ptq161(steps=25)
    for recipe in (replace(ptq, tuning=()), ptq):
        # of one block only
        model = quantize(
            copy.deepcopy(tiny_lm), recipe, calibration, keep=["layers.0", *KEEP[2:], "layers.4", "layers.5"]
        )
        outputs.append(model(text, output_hidden_states=True).hidden_states[2])
    before, after = ((output - dense).square().sum() for output in outputs)
    assert after < 0.7 * before


@torch.no_grad()
def test_the_mask_and_the_scales_each_keep_more_of_a_binary_model(tiny_lm, data):
    calibration, text = list(data[0].split(4)), data[1]
    teacher = Teacher(tiny_lm, rows([{"input_ids": text}]))
    ptq = recipes.ptq161(steps=20)
    found = [
        divergence(teacher, quantize(copy.deepcopy(tiny_lm), recipe, calibration, keep=KEEP))
        for recipe in (Recipe(BinaryGrid(None, centred=True)), replace(ptq, tuning=()), ptq)
    ]
    assert found[2] < found[1] < found[0] < float("inf")


@pytest.mark.slow
@torch.no_grad()
def test_deviation_aware_distillation_is_no_worse_than_uniform(tiny_lm, data):
    """On text that was not learnt from; another order of the sequences is worth 3%."""
    calibration, text = data
    teacher = Teacher(tiny_lm, rows([{"input_ids": text}]))
    start = recipes.dbllm()
    tunings = [(), (DeviationAware(0.0, 80, 2),), (DeviationAware(steps=80, batch_size=2),)]
    before, uniform, weighted = (
        divergence(teacher, quantize(copy.deepcopy(tiny_lm), replace(start, tuning=t), calibration, keep=KEEP))
        for t in tunings
    )
    assert uniform < 0.8 * before
    assert weighted < 1.03 * uniform
