"""Axis compensation: what is added is what is stored, and the best that so many numbers can do."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.quant import Recipe, quantize
from tersor.quant.compensation import LowRank, SparseOutliers
from tersor.quant.grid import BilevelInt, IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ, RTN, SpQR

PIECES = [LowRank(4), LowRank(4, "weight"), SparseOutliers(0.05)]
SHAPES = [(24, 40), (40, 24)]
every_piece = pytest.mark.parametrize("piece", PIECES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def layer(shape, generator, tokens=100):
    """An error (out, in), and inputs (tokens, in) that are correlated."""
    x = torch.randn(tokens, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    return torch.randn(shape, generator=generator), x


def moments(x):
    return (x.T @ x).double() / len(x)


def lost(error, decoded, x):
    return float(((error - decoded).double() @ x.double().T).norm())


@every_piece
@every_shape
def test_buffers_are_as_laid_out(piece, shape, generator):
    error, x = layer(shape, generator)
    fitted, stored = piece.fit(error, moments(x))
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == fitted.layout(*shape)
    assert fitted.decode(stored, shape).shape == shape


@every_piece
@every_shape
@pytest.mark.parametrize("lead", [(40,), (3, 5), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_is_the_product_with_what_is_decoded(piece, shape, lead, dtype, generator):
    error, x = layer(shape, generator)
    fitted, stored = piece.fit(error, moments(x))
    h, y = torch.randn(*lead, shape[1], generator=generator), torch.randn(*lead, shape[0], generator=generator)
    added = fitted.add(y.to(dtype), h.to(dtype), stored)
    assert added.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5  # bf16 mantissa, several roundings
    expected = y + h @ fitted.decode(stored, shape).T
    torch.testing.assert_close(added.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@every_piece
def test_gradients_flow_to_the_input(piece, generator):
    error, x = layer((24, 40), generator)
    fitted, stored = piece.fit(error, moments(x))
    h = torch.randn(3, 40, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(fitted.add(torch.zeros(3, 24), h, stored).sum(), h)
    torch.testing.assert_close(gradient, fitted.decode(stored, (24, 40)).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


@every_shape
@pytest.mark.parametrize("tokens", [100, 10], ids=lambda n: f"{n} tokens")
def test_the_low_rank_is_the_best_for_the_outputs(shape, tokens, generator):
    """Eckart and Young: what is left are the singular values of E X^T after the first ones; with few tokens, too."""
    error, x = layer(shape, generator, tokens)
    fitted, stored = LowRank(4).fit(error, moments(x))
    best = float(torch.linalg.svdvals(error.double() @ x.double().T)[4:].norm())
    ours = lost(error, fitted.decode(stored, shape), x)
    # factors in float16: each product is off by 2^-11 of itself, errors that add up to less than 1e-3 of it
    assert best * (1 - 1e-9) <= ours <= best * (1 + 1e-3)


@every_shape
def test_for_the_outputs_it_loses_less_than_for_the_weight_and_that_less_than_nothing(shape, generator):
    error, x = layer(shape, generator)
    ours, plain = (
        lost(error, fitted.decode(stored, shape), x)
        for fitted, stored in (LowRank(4, metric).fit(error, moments(x)) for metric in ("outputs", "weight"))
    )
    assert ours < plain < lost(error, 0, x)


@every_shape
@pytest.mark.parametrize("metric", ["outputs", "weight"])
def test_full_rank_restores_the_weight(shape, metric, generator):
    error, x = layer(shape, generator)
    fitted, stored = LowRank(24, metric).fit(error, moments(x))
    # 24 products of two float16, each off by 2^-11
    torch.testing.assert_close(fitted.decode(stored, shape), error, rtol=2**-10, atol=2**-10 * float(error.abs().max()))


def test_no_error_needs_no_compensation():
    for piece in (*PIECES, SparseOutliers()):
        fitted, stored = piece.fit(torch.zeros(24, 40), torch.eye(40).double())
        assert not fitted.decode(stored, (24, 40)).any()


def test_outliers_are_those_that_matter_most(generator):
    error, x = layer((24, 40), generator)
    H = moments(x)
    for hessian in (H, None):
        fitted, stored = SparseOutliers(0.1).fit(error, hessian)
        kept = fitted.decode(stored, (24, 40)) != 0
        loss = error.square() * (1 if hessian is None else hessian.diagonal().float())
        assert kept.sum() == 96
        assert loss[kept].min() >= loss[~kept].max()


def test_all_outliers_are_the_error_in_float16(generator):
    error = torch.randn(24, 40, generator=generator)
    fitted, stored = SparseOutliers().fit(error, None)
    assert torch.equal(fitted.decode(stored, (24, 40)), error.half().float())
    assert fitted.count == 24 * 40


RECIPES = [
    Recipe(IntGrid(3, 32), RTN(), compensation=LowRank(8)),
    Recipe(IntGrid(3, 32), GPTQ(), compensation=LowRank(8, "weight")),
    Recipe(IntGrid(3, 32), RTN(), compensation=SparseOutliers(0.02)),
    Recipe(BilevelInt(), SpQR(), compensation=SparseOutliers()),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_compensated_model_comes_back_from_disk(recipe, make_model, ids, tmp_path):
    model = quantize(make_model(), recipe, ids)
    bare = quantize(
        make_model(), Recipe(recipe.grid, GPTQ(order="group") if recipe.solver == SpQR() else recipe.solver), ids
    )
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.relative_error is not None
            assert layer.nbytes > bare.get_submodule(name).nbytes
    first = model.model.layers[0].self_attn.q_proj
    assert first.relative_error < relative(bare, first, ids, make_model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def relative(bare, first, ids, make_model):
    """Relative error of the outputs of the first layer without a compensation."""
    model = make_model()
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    dense, without = model.model.layers[0].self_attn.q_proj(x), bare.model.layers[0].self_attn.q_proj(x)
    return float((dense - without).square().sum() / dense.square().sum())


def test_of_a_few_weights_one_is_kept_and_none_is_lost_beyond_float16():
    error = torch.arange(32.0).view(4, 8)
    piece, stored = SparseOutliers(0.01).fit(error, None)
    assert piece.decode(stored, (4, 8)).flatten().tolist() == [0] * 31 + [31]
    with pytest.raises(ValueError, match="outliers up to 7e\\+04 are beyond float16"):
        SparseOutliers(0.1).fit(torch.full((4, 8), 7e4), None)


def test_what_does_not_suit_is_refused():
    with pytest.raises(ValueError, match=r"rank = 32 is beyond that of a weight \(64, 16\); use at most 16"):
        LowRank(32).check(64, 16)
    with pytest.raises(ValueError, match='needs calibration data; without, use metric="weight"'):
        LowRank(4).fit(torch.randn(8, 8), None)
    with pytest.raises(ValueError, match="columns are stored in 16 bits"):
        SparseOutliers().check(8, 2**16)
    for setting in ({"rank": 0}, {"metric": "l2"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            LowRank(**setting)
    with pytest.raises(ValueError, match="ratio"):
        SparseOutliers(0.0)
