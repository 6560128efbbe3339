"""Tunings of codebooks and codes on a trained model: frozen codes, straight-through estimation, PV."""

import copy
import statistics

import pytest
import torch
from torch import Tensor

from tersor.quant import Recipe, quantize
from tersor.quant.calibration import batches
from tersor.quant.grid import AdditiveGrid
from tersor.quant.teacher import Teacher, rows
from tersor.quant.tuning import PV, BlockMSE, StraightThrough

LENGTH = 128
# to be kept: all blocks but the last
LAST_BLOCK = [f"layers.{index}" for index in range(5)]


@pytest.fixture
def text(held_out_text, tiny_lm_tokenizer) -> Tensor:
    ids = tiny_lm_tokenizer(held_out_text[:40_000], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def test_a_tuned_block_keeps_more_of_unseen_text(text, tiny_lm):
    """AQLM's, of one codebook of 256 vectors of 8."""
    unseen = Teacher(tiny_lm, rows(batches(text[-8:])))
    found = {}
    for tuning in ((), (BlockMSE(steps=20, target="inputs"),)):
        unseen.model = copy.deepcopy(tiny_lm)
        quantize(unseen.model, Recipe(AdditiveGrid(), tuning=tuning), text[:32].split(4), keep=LAST_BLOCK)
        found[tuning] = unseen.divergence()
    before, after = found.values()
    assert after < 0.95 * before


@pytest.mark.slow
@torch.no_grad()
def test_codes_that_move_keep_more_than_frozen_ones_and_limits_keep_large_steps_from_going_astray(text, tiny_lm):
    """After as many steps on as many sequences, of unseen text, in the mean of three orders of the data.

    The paper's order, PV < straight-through < frozen, holds where steps are large: at five times the usual rate
    straight-through estimation ends little below frozen codes (.250 and .271), PV at .166. At the usual rate both are the
    same to 2%: fewer codes would change in a step than the limit allows.
    """
    teacher, unseen = Teacher(tiny_lm, rows(batches(text[:48])), 256), Teacher(tiny_lm, rows(batches(text[-16:])))
    model = quantize(tiny_lm, Recipe(AdditiveGrid()), keep=LAST_BLOCK)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def divergence(tuning: PV | StraightThrough) -> float:
        model.load_state_dict(start)
        tuning.tune(model, teacher)
        return unseen.divergence()

    same = {"steps": 24, "batch_size": 4}
    large: dict[str, list[float]] = {"pv": [], "straight through": [], "frozen": []}
    for seed in range(3):
        large["pv"].append(divergence(PV(**same, code_rate=0.8, seed=seed)))
        large["straight through"].append(divergence(StraightThrough(**same, code_rate=0.8, seed=seed)))
        large["frozen"].append(divergence(PV(**same, max_code_change=0.0, seed=seed)))
    pv, straight_through, frozen = (statistics.mean(losses) for losses in large.values())
    assert pv < 0.8 * min(straight_through, frozen)
    for usual in (PV(**same), StraightThrough(**same)):
        assert divergence(usual) < 0.7 * frozen
