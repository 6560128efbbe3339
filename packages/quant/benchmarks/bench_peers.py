"""Ours beside other libraries: the same model, calibration text, bits and groups, measured on the same text.

    pytest packages/quant/benchmarks/bench_peers.py --benchmark-only --benchmark-json=peers.json -m "slow and not real"
    python packages/quant/benchmarks/table.py peers.json

A library that cannot be imported is skipped by name. Times are CPU seconds of one thread, the reading of the model by those
that read it themselves included. Of Gemma-3-270M (`-m real`) AutoRound takes an hour, and what is learnt by ours is slow too.
"""

import copy
import importlib
import importlib.metadata
import time
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from tersor.quant import Recipe, recipes
from tersor.quant.grid import IntGrid
from tersor.quant.solver import GPTQ, ClipSearch, CoordinateDescent
from tersor.quant.tuning import PV, BlockReconstruction

from .measured import measure, with_recipe

pytestmark = [pytest.mark.slow, pytest.mark.benchmark(timer=time.process_time), pytest.mark.usefixtures("one_thread")]

# files in peers/
PEERS = ["autoround", "llm_compressor", "gptqmodel", "hqq", "bitsandbytes", "quanto", "torchao"]
GRIDS = {
    "tiny-lm": [(4, 64), (4, 128), (3, 64), (3, 128), (2, 32), (2, 64)],
    "gemma-3-270m": [(4, 64), (3, 64), (2, 64)],
}
# ranges and roundings for the layer's outputs, groups in the order of their inputs
CLIPPED = CoordinateDescent(GPTQ(order="group", clip=ClipSearch("diagonal", smallest=0.4, steps=24)))
# by what the whole model predicts; scales and norms alone, and few steps: one of Gemma takes half a minute
SCALES = PV(40, max_code_change=0.0)


def clipped(bits: int, group_size: int) -> Recipe:
    return Recipe(IntGrid(bits, group_size), CLIPPED)


def rotated(bits: int, group_size: int) -> Recipe:
    return replace(clipped(bits, group_size), transforms=recipes.quarot(activation_bits=None).transforms)


def clipped_scales_learnt(bits: int, group_size: int) -> Recipe:
    return replace(clipped(bits, group_size), tuning=(BlockReconstruction(120), SCALES))


def rotated_learnt(bits: int, group_size: int) -> Recipe:
    return replace(rotated(bits, group_size), tuning=(BlockReconstruction(120), PV(100)))


def vectors_learnt(bits: int, group_size: int) -> Recipe:
    """A byte for four weights, and codebooks of at most .2 bits per weight: fewer than the others take in groups of 64."""
    if (bits, group_size) != (2, 64):
        raise NotImplementedError("codebooks of 256 vectors of 4 numbers are 2 bits")
    return recipes.pv_tuning(1, 8, 4, steps=100)


def vectors_scales_learnt(bits: int, group_size: int) -> Recipe:
    recipe = vectors_learnt(bits, group_size)
    return replace(recipe, tuning=(*recipe.tuning[:-1], SCALES))


OURS = {
    "rtn": recipes.rtn,
    "hqq": recipes.hqq,
    "gptq": recipes.gptq,
    "clipped": clipped,
    "clipped, scales learnt": clipped_scales_learnt,
    "rotated": rotated,
    "rotated, learnt": rotated_learnt,
    "vectors, learnt": vectors_learnt,
    "vectors, scales learnt": vectors_scales_learnt,
}


FOR_TINY = [name for name in OURS if "scales" not in name]
# norms after attention and MLP keep Gemma from being rotated
FOR_GEMMA = ["rtn", "hqq", "gptq", "clipped", "clipped, scales learnt", "vectors, scales learnt"]


def cases(tiny: list[str], gemma: list[str]):
    """Name, model, bits, group_size."""
    for model, names in (("tiny-lm", tiny), ("gemma-3-270m", gemma)):
        marks = [pytest.mark.real] if model == "gemma-3-270m" else []
        for name, (bits, group_size) in product(names, GRIDS[model]):
            yield pytest.param(name, model, bits, group_size, marks=marks, id=f"{model}-{bits}-{group_size}-{name}")


def widths(bits: int, group_size: int) -> str:
    return f"W{bits}, groups of {group_size}"


@pytest.mark.parametrize(("name", "model", "bits", "group_size"), list(cases(PEERS, PEERS)))
def test_peer(name, model, bits, group_size, benchmark, subject):
    try:
        peer = importlib.import_module(f"{__package__}.peers.{name}")
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}): uv sync --all-packages --group peers, or pip install it")

    def quantise(model, calibration):
        # its layers are left behind: all are measured with plain linears in float32
        decoded = peer.quantise(copy.deepcopy(model), calibration, bits, group_size)
        for layer, weight in decoded.weights.items():
            model.get_submodule(layer).weight.data.copy_(weight)
        return model, decoded.bits_per_weight

    version = importlib.metadata.version(peer.DISTRIBUTION)
    try:
        measure(benchmark, subject(model), widths(bits, group_size), f"{name} {version}", quantise)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "model", "bits", "group_size"), list(cases(FOR_TINY, FOR_GEMMA)))
def test_ours(name, model, bits, group_size, benchmark, subject):
    try:
        recipe = OURS[name](bits, group_size)
    except NotImplementedError as error:
        pytest.skip(str(error))

    measure(benchmark, subject(model), widths(bits, group_size), f"ours: {name}", partial(with_recipe, recipe, model))
