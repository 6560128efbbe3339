"""BitStack, on a trained model: what a stack keeps at the size of other quantisers, and what the order is worth."""

import copy

import pytest
import torch
from torch import Tensor

from tersor.quant import quantize, recipes
from tersor.quant.allocation import StackOrder
from tersor.quant.elastic import load_stack, save_stack, stacks
from tersor.quant.linear import QuantizedLinear
from tersor.quant.teacher import Teacher

LENGTH = 256
# to be kept: all blocks but the first
ONE_BLOCK = [f"layers.{index}" for index in range(1, 6)]


@pytest.fixture
def rows(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:160_000], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def teacher_of(model, rows: Tensor) -> Teacher:
    return Teacher(model, [{"input_ids": row[None]} for row in rows], top_k=64)


@pytest.mark.slow
@torch.no_grad()
def test_two_bits_as_a_stack_keep_more_than_rounding_and_less_than_gptq(tiny_lm, rows):
    """The paper's claim, to match GPTQ at its size, does not hold here: 2 blocks of rank 1 (2.2 bits) lose about .44 nats, 2
    bits in groups of 64 (2.28 bits) .63 rounded to nearest and .16 with GPTQ. At 3.3 bits rounding wins too, .08 to .16.
    """
    calibration, teacher = rows[:24], teacher_of(tiny_lm, rows[-8:])
    divergence, nbytes = {}, {}
    for name, recipe in {
        "stack": recipes.bitstack(2, 1),
        "rtn": recipes.rtn(2, 64),
        "gptq": recipes.gptq(2, 64),
    }.items():
        model = teacher.model = quantize(copy.deepcopy(tiny_lm), recipe, calibration)
        divergence[name] = teacher.divergence()
        nbytes[name] = sum(layer.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert nbytes["stack"] < nbytes["rtn"] == nbytes["gptq"]
    assert divergence["gptq"] < divergence["stack"] < divergence["rtn"]


@torch.no_grad()
def test_the_order_found_loses_less_on_the_way_than_its_reverse(tiny_lm, rows, tmp_path):
    """On other text than it was found on, with half of a level's bytes."""
    teacher = teacher_of(tiny_lm, rows[-4:])
    model = quantize(tiny_lm, recipes.bitstack(3, 4), rows[:12], keep=ONE_BLOCK)
    order, layers = StackOrder().order(model, rows[12:16]), len(stacks(model))
    levels = [order[start : start + layers] for start in range(0, len(order), layers)]
    save_stack(model, tmp_path / "found", order)
    save_stack(model, tmp_path / "reversed", [name for level in levels for name in reversed(level)])
    nbytes = load_stack(tmp_path / "found", 2**40).nbytes
    # two of three blocks
    further = sum(layer.nbytes * 2 // 3 for layer in stacks(model).values())
    losses = {}
    for directory in ("found", "reversed"):
        # a quarter of them: half of the first level
        teacher.model = load_stack(tmp_path / directory, nbytes - 3 * further // 4).model
        losses[directory] = teacher.divergence()
    assert losses["found"] < losses["reversed"]
