"""Exports of any format: whole or not there, with what belongs to the model, refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tersor.quant import quantize, recipes
from tersor.quant.export import FORMATS, Unexportable, export
from tersor.quant.export.layers import quantized
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme

CHECKPOINTS = [name for name in FORMATS if name != "gguf"]
pytestmark = pytest.mark.filterwarnings("ignore:engines on GPUs")


@pytest.fixture
def model(make_model):
    return quantize(make_model(), recipes.rtn(4, 32))


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    if request.param == "gguf":
        pytest.importorskip("gguf")
    return request.param


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_what_is_not_quantised_is_saved_as_it_is(format, model, tmp_path):
    export(model, tmp_path / "out", format)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(stored["model.layers.1.input_layernorm.weight"], model.model.layers[1].input_layernorm.weight)
    assert not any(key.endswith(("codes", "scale_bits", "zero_points")) for key in stored)
    assert (tmp_path / "out/generation_config.json").is_file()


def test_the_model_is_as_it_was(format, model, ids, tmp_path):
    config, before = model.config.to_dict(), model(ids).logits
    export(model, tmp_path / "out", format)
    assert model.config.to_dict() == config
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "tersor"


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_the_tokenizer_goes_with_the_model(format, model, tiny_lm_path, tiny_lm_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    text = "It was the best of times."
    for i, tokenizer in enumerate((tiny_lm_path, tiny_lm_tokenizer)):
        export(model, tmp_path / str(i), format, tokenizer=tokenizer)
        again = AutoTokenizer.from_pretrained(tmp_path / str(i))
        assert again(text).input_ids == tiny_lm_tokenizer(text).input_ids


def test_an_empty_directory_is_no_obstacle_and_anything_else_is(format, model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    export(model, target, format)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    with pytest.raises(FileExistsError, match="out exists already: choose another target"):
        export(model, target, format)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_is_left_of_an_export_that_fails(format, model, tmp_path, monkeypatch):
    import builtins

    written = []

    def full(path, *args, **kwargs):
        if tmp_path in Path(path).parents:
            written.append(path)
            raise OSError(28, "No space left on device")
        return opened(path, *args, **kwargs)

    opened = builtins.open
    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space left"):
        export(model, tmp_path / "out", format)
    assert written
    assert not list(tmp_path.iterdir())


class Doubling:
    """A piece that no format knows."""

    def check(self, *_):
        pass

    def layout(self, *_):
        return {}

    def __repr__(self):
        return "Doubling()"


@pytest.mark.parametrize("axis", ["transform", "activation", "compensation"])
def test_layers_that_are_more_than_a_grid_are_refused_before_anything_is_written(axis, format, model, tmp_path):
    name, layer = list(quantized(model).items())[3]
    scheme = Scheme(layer.scheme.grid, **{axis: Doubling()})
    model.set_submodule(
        name,
        QuantizedLinear.from_linear(nn.Linear(layer.in_features, layer.out_features, False), scheme, layer.stored()),
    )
    with pytest.raises(
        Unexportable, match=rf"{name}: .* has no place for the {axis} Doubling\(\); save_pretrained keeps it"
    ):
        export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_named(make_model, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantised layer"):
        export(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="format must be one of compressed-tensors, gptq, awq, gguf, got 'onnx'"):
        export(make_model(), tmp_path / "out", "onnx")
    with pytest.raises(TypeError, match="must be a model of transformers, got Linear"):
        export(nn.Linear(3, 3), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no is no directory: create it first"):
        export(quantize(make_model(), recipes.rtn(4, 32)), tmp_path / "no/out")
