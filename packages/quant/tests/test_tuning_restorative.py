"""RestorativePreprocess: what is quantised the second time, what stays, and on a trained model what it is worth."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.calibration import own_part
from tersor.quant.grid import IntGrid, MaskedBinary
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import WeightedRTN
from tersor.quant.teacher import Teacher, rows
from tersor.quant.transform import Hadamard
from tersor.quant.tuning import BlockScales
from tersor.quant.tuning.restorative import RestorativePreprocess, RestoredLinear, grouped
from tersor.quant.tuning.trainable import trainable

CHANGED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Noting(WeightedRTN):
    """Keeps the weights that it is given; fails once it has seen so many."""

    limit: int = 1000
    seen: ClassVar[list[Tensor]] = []

    def solve(self, weight, grid, hessian):
        if len(self.seen) == self.limit:
            raise ValueError("no more")
        self.seen.append(weight.clone())
        return super().solve(weight, grid, hessian)


@pytest.fixture(autouse=True)
def nothing_seen():
    Noting.seen.clear()


@pytest.fixture
def sharp(make_model):
    """A model whose predictions are less alike than those of fresh ones."""

    def make(kind="llama", dtype=torch.float32):
        model = make_model(kind, dtype)
        # of a copy: elsewhere it may be the embedding, too
        model.lm_head.weight = nn.Parameter(40 * model.lm_head.weight.data)
        return model

    return make


def recipe(first: Recipe | None = None, **settings) -> Recipe:
    """With the preprocessing, of a few steps with small matrices."""
    first = first or Recipe(MaskedBinary(), Noting())
    settings = {"rank": 4, "steps": 5, "batch_size": 8} | settings
    return replace(first, tuning=(*first.tuning, RestorativePreprocess(first, **settings)))


def quantized_layers(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def same(one, other) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(t, states[1][name]) for name, t in states[0].items()
    )


def test_no_steps_change_nothing(kind, make_model, ids):
    first = Recipe(MaskedBinary(), Noting(), tuning=(BlockScales(5),))
    data = list(ids.split(8))
    once, twice = quantize(make_model(kind), first, data), quantize(make_model(kind), recipe(first, steps=0), data)
    assert same(once, twice)
    assert len(Noting.seen) == 3 * 14
    # no more does what the second quantisation is given and makes of it
    assert all(torch.equal(*pair) for pair in zip(Noting.seen[14:28], Noting.seen[28:]))


def test_what_is_quantised_again_is_the_weight_and_its_change(sharp, ids):
    """W + alpha / r B A, and W where nothing is learnt."""

    class Watched(RestorativePreprocess):
        def changes(self, model, teacher):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            changes = super().changes(model, teacher)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            self.found.update(changes)
            return changes

        found: ClassVar[dict[str, Tensor]] = {}

    first = Recipe(MaskedBinary(), Noting())
    dense = {name: m.weight.detach().clone() for name, m in sharp().named_modules() if isinstance(m, nn.Linear)}
    model = quantize(sharp(), replace(first, tuning=(Watched(first, 4, steps=5),)), ids)
    assert {name.split(".")[-1] for name in Watched.found} == set(CHANGED)
    # blocks call their layers in the order in which they have them
    for name, weight in zip(quantized_layers(model), Noting.seen[14:], strict=True):
        change = Watched.found.get(name, torch.zeros_like(weight))
        assert torch.equal(weight, dense[name] + change), name
        assert torch.linalg.matrix_rank(change) == (4 if name in Watched.found else 0), name


@torch.no_grad()
def test_the_change_is_alpha_over_r_times_b_a(make_model, ids, generator):
    model = quantize(make_model("qwen2"), Recipe(IntGrid(2, 32)))
    expected = model(ids[:2]).logits
    with trainable(model, RestoredLinear) as layers, torch.no_grad():
        for layer in layers.values():
            layer.add_low_rank(4, 6.0, generator)
        # not by the kernel of the grid
        torch.testing.assert_close(model(ids[:2]).logits, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(layer.change, torch.zeros_like(layer.weight)) for layer in layers.values())
        layer = model.model.layers[1].self_attn.q_proj
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator))
        torch.testing.assert_close(layer.change, 6 / 4 * layer.B @ layer.A)
        x = torch.randn(5, 64, generator=generator)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.change, layer.bias), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids[:2]).logits, expected)


def test_what_is_kept_stays_and_bytes_are_the_same(kind, sharp, ids):
    keep = ["layers.0", "k_proj"]
    original = sharp(kind)
    once, twice = (quantize(sharp(kind), each, ids, keep=keep) for each in (recipes.ptq161(steps=5), recipe()))
    layers, again = quantized_layers(once), quantized_layers(twice)
    assert layers.keys() == again.keys()
    assert len(layers) == 6
    assert all(
        layer.nbytes == again[name].nbytes and layer.scheme == again[name].scheme for name, layer in layers.items()
    )
    assert all(layer.original is None for layer in again.values())
    for name, parameter in twice.named_parameters():
        if name.rpartition(".")[0] not in again:
            assert torch.equal(parameter, original.get_parameter(name)), name


def test_it_lowers_the_divergence_in_any_dtype(sharp, ids):
    for dtype in (torch.float32, torch.bfloat16):
        first, found = Recipe(MaskedBinary(), WeightedRTN()), []
        teacher = Teacher(sharp(dtype=dtype), rows([{"input_ids": ids}]))
        for each in (first, recipe(first, rank=16, steps=40)):
            teacher.model = quantize(sharp(dtype=dtype), each, ids)
            with torch.no_grad():
                found.append(teacher.divergence())
        assert found[1] < 0.9 * found[0], dtype


def test_a_change_that_does_not_help_is_dropped(sharp, ids):
    first = Recipe(MaskedBinary(), Noting())
    astray = recipe(first, steps=1, rate=100.0)
    assert same(quantize(sharp(), first, ids), quantize(sharp(), astray, ids))
    assert len(Noting.seen) == 3 * 14


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"layers.1.*no more"),  # in the second block
        ({"rate": float("inf")}, "the weight holds NaN or infinity"),
        (
            {"layers": ("c_attn",)},
            r"layers=\('c_attn',\) names none of the quantised linears.*layers.0.self_attn.q_proj",
        ),
    ],
    ids=["solver", "diverged", "no layers"],
)
def test_where_it_cannot_be_quantised_again_the_weights_are_the_original_ones(settings, said, sharp, ids):
    model, original = sharp("qwen2"), sharp("qwen2")
    with pytest.raises(ValueError, match=said):
        quantize(model, recipe(Recipe(MaskedBinary(), Noting(limit=14 + 10)), **settings), ids)
    assert not quantized_layers(model)
    assert same(model, original)
    # and nothing stands in the way of another one
    assert len(quantized_layers(quantize(model, Recipe(IntGrid(4, 32)), ids))) == 14


def test_transforms_at_run_time_are_undone_before_weights_are_merged(sharp, ids):
    quantize(sharp(), recipe(Recipe(MaskedBinary(), Noting(), (Hadamard(block_size=32),)), steps=0), ids)
    for weight, again in zip(Noting.seen[:14], Noting.seen[14:], strict=True):
        torch.testing.assert_close(weight, again, rtol=1e-4, atol=1e-6)


def test_processes_go_on_with_their_own_sequences(ids, monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    own = rows([{"input_ids": ids[:6]}, {"input_ids": ids[6:7, :9], "attention_mask": torch.ones(1, 9)}])
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        first, second, last = own_part(grouped(own, 4))
        assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), ids[:6])
        assert len(first["input_ids"]) == 4
        assert last.keys() == {"input_ids", "attention_mask"}
        assert torch.equal(last["input_ids"], ids[6:7, :9])


def test_it_names_what_it_cannot_do(sharp, ids):
    first = Recipe(IntGrid(2, 32))
    for setting, value, said in (
        ("rank", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("steps", -1, "not be negative"),
        ("alpha", 0.0, "positive"),
        ("rate", -1.0, "positive"),
    ):
        with pytest.raises(ValueError, match=f"{setting} must .*{said}, got {value}"):
            RestorativePreprocess(first, **{setting: value})
    with pytest.raises(NotImplementedError, match="LowRank"):
        RestorativePreprocess(recipes.eora(2, 32))
    with pytest.raises(NotImplementedError, match="q_proj: LowRank"):
        quantize(sharp(), replace(recipes.eora(2, 32, 4), tuning=(RestorativePreprocess(first),)), ids)
    teacher = Teacher(sharp(), rows([{"input_ids": ids}]))
    with pytest.raises(ValueError, match="within `quantize`"):
        RestorativePreprocess(first).tune(quantize(sharp(), first), teacher)


def test_the_recipe_has_it_where_steps_are_given():
    plain, restored = recipes.ptq161(steps=10), recipes.ptq161(steps=10, restorative_steps=7)
    assert restored == replace(plain, tuning=(BlockScales(10), RestorativePreprocess(plain, steps=7)))
    assert plain.tuning == (BlockScales(10),)


def test_what_was_restored_is_saved_and_comes_back(make_model, ids, tmp_path):
    model = quantize(make_model(), recipe(recipes.ptq161(steps=5)), ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_a_trained_model_that_was_restored_keeps_more(tiny_lm, held_out_text, tiny_lm_tokenizer):
    """Of text that was not learnt from, in its last two blocks, whatever the seed: all of them take a sixth off."""
    # minutes otherwise
    keep = ["layers.0", "layers.1", "layers.2", "layers.3"]
    ids = tiny_lm_tokenizer(held_out_text[:40_000], return_tensors="pt", verbose=False).input_ids[0]
    every = ids[: 112 * 64].view(-1, 64)
    calibration, text = list(every[:64].split(8)), every[64:]
    teacher = Teacher(tiny_lm, rows([{"input_ids": text}]))

    def measured(each: Recipe) -> tuple[float, int]:
        teacher.model = quantize(copy.deepcopy(tiny_lm), each, calibration, keep=keep)
        return teacher.divergence(), sum(layer.nbytes for layer in quantized_layers(teacher.model).values())

    first = recipes.ptq161(steps=20)
    without, nbytes = measured(first)
    for seed in range(3):
        tuning = RestorativePreprocess(first, steps=40, seed=seed)
        restored, same_nbytes = measured(replace(first, tuning=(*first.tuning, tuning)))
        assert same_nbytes == nbytes
        assert restored < 0.9 * without
