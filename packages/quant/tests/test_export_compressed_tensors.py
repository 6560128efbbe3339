"""compressed-tensors: the library decodes what we write to the same weights, transformers loads it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from tersor.quant import Recipe, quantize
from tersor.quant.activation import IntActivation
from tersor.quant.export import Unexportable, compressed_tensors, export
from tersor.quant.grid import IntGrid
from tersor.quant.grid.float import FloatGrid
from tersor.quant.grid.microscaling import MXFP4Grid, NVFP4Grid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme

pytest.importorskip("compressed_tensors", minversion="0.20")

quick = settings(deadline=None, max_examples=40, derandomize=True)
FLOATS = [
    FloatGrid("e4m3", None, 1),
    FloatGrid("e4m3", None, None),
    FloatGrid("e4m3", 32, 64),
    FloatGrid("e4m3", 32, 1),
]
BLOCKS = [MXFP4Grid(), NVFP4Grid()]


def layer_of(grid, out=40, width=96, activation=None, seed=0) -> QuantizedLinear:
    linear = nn.Linear(width, out, bias=False)
    linear.weight.data = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    params = grid.fit(linear.weight.data)
    stored = grid.pack(grid.encode(linear.weight.data, params), params)
    return QuantizedLinear.from_linear(linear, Scheme(grid, activation=activation), stored)


def decompressed(layer: QuantizedLinear) -> torch.Tensor:
    """The weight that the library makes of what we write."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(compressed_tensors.config(nn.Sequential(layer)))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors = compressed_tensors.tensors("0", layer)
    assert set(tensors) == set(compressor.compression_param_names(scheme))
    return compressor.decompress(tensors, scheme)["weight"]


@quick
@given(st.integers(1, 8), st.sampled_from([8, 32, None]), st.integers(1, 70), st.integers(1, 3), st.booleans())
def test_the_library_decodes_integers_to_the_same_bits(bits, group_size, out, groups, symmetric):
    layer = layer_of(IntGrid(bits, group_size, symmetric), out, 32 * groups)
    assert torch.equal(decompressed(layer), layer.dequantize())


def test_the_library_decodes_restricted_integers_to_the_same_bits():
    layer = layer_of(IntGrid(8, None, symmetric=True, restricted=True))
    assert torch.equal(decompressed(layer), layer.dequantize())


@pytest.mark.parametrize("grid", FLOATS, ids=str)
def test_the_library_decodes_e4m3_to_the_same_bits(grid):
    layer = layer_of(grid, out=100)  # the last block of 64 rows is not full
    assert torch.equal(decompressed(layer), layer.dequantize())


@pytest.mark.parametrize("grid", BLOCKS, ids=str)
def test_the_library_decodes_blocks_of_four_bit_floats_to_the_same_up_to_bfloat16(grid):
    layer = layer_of(grid)
    # it rounds the scale to bfloat16, and the product once more
    torch.testing.assert_close(decompressed(layer).float(), layer.dequantize(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, None])
def test_the_library_decodes_integers_that_meet_rounded_inputs_to_the_same_bits(bits, group_size):
    layer = layer_of(IntGrid(bits, group_size, symmetric=True), activation=IntActivation(8))
    assert torch.equal(decompressed(layer), layer.dequantize())


def loaded(model, directory, **options):
    again = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(isinstance(module, QuantizedLinear) for module in again.modules())
    return again


@torch.no_grad()
def distance(one, other, ids) -> float:
    return float((one(ids).logits - other(ids).logits).abs().max())


@pytest.mark.parametrize("grid", [IntGrid(4, 32, True), IntGrid(3, None, True), *FLOATS[:2]], ids=str)
def test_transformers_computes_the_same_logits(grid, make_model, ids, tmp_path):
    model = quantize(make_model("gemma3"), Recipe(grid), keep=["layers.1.self_attn.o_proj"])
    export(model, tmp_path / "out")
    assert distance(model, loaded(model, tmp_path / "out"), ids) < 1e-5


@pytest.mark.parametrize(("grid", "tolerance"), [(IntGrid(4, 32), 1e-5), *((g, 0.02) for g in BLOCKS)], ids=str)
def test_transformers_computes_the_same_logits_if_it_decodes_at_once(grid, tolerance, make_model, ids, tmp_path):
    """It cannot otherwise where there are zero points, nor with four-bit floats in a float32 model."""
    from transformers import CompressedTensorsConfig

    model = quantize(make_model("qwen2"), Recipe(grid))
    export(model, tmp_path / "out")
    dense = CompressedTensorsConfig(dequantize=True)
    assert distance(model, loaded(model, tmp_path / "out", quantization_config=dense), ids) < tolerance


@pytest.mark.parametrize("activation", [IntActivation(8), IntActivation(8, 32)], ids=str)
def test_transformers_rounds_the_inputs_too(activation, make_model, ids, tmp_path):
    grid = IntGrid(8, None, symmetric=True, restricted=True)
    model = quantize(make_model(), Recipe(grid, activation=activation))
    export(model, tmp_path / "out")
    again = loaded(model, tmp_path / "out")
    # steps of the inputs are 127 to the largest magnitude here, 127.5 there
    assert 0 < distance(model, again, ids) < 0.02
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    project = again.model.layers[0].mlp.up_proj
    with torch.no_grad():
        assert not torch.equal(project(inputs), inputs @ project.weight.T)


def test_layers_of_different_grids_form_groups(make_model, ids, tmp_path):
    wide = {f"model.layers.{i}.mlp.down_proj": FloatGrid("e4m3") for i in range(2)}
    model = quantize(make_model(), Recipe(IntGrid(4, 32, symmetric=True)), allocation=wide)
    export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "float-quantized"]
    assert config["config_groups"]["group_1"]["targets"] == list(wide)
    assert distance(model, loaded(model, tmp_path / "out"), ids) < 1e-5


def test_inputs_that_the_library_has_no_word_for_are_refused(make_model, tmp_path):
    for grid, activation, reason in (
        (IntGrid(4, 32), IntActivation(8), "wants symmetric integers with IntActivation"),
        (FloatGrid(), IntActivation(8), "wants symmetric integers with IntActivation"),
        (IntGrid(4, 32, symmetric=True), IntActivation(4, clip=0.9), "no place for the activation IntActivation"),
    ):
        model = quantize(make_model(), Recipe(grid, activation=activation))
        with pytest.raises(Unexportable, match=rf"q_proj: compressed-tensors .*{reason}"):
            export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "grid",
    [FloatGrid("e5m2"), FloatGrid("e4m3", 32, None), FloatGrid("e4m3", None, 2), MXFP4Grid(group_size=16)],
    ids=str,
)
def test_grids_that_the_library_has_no_word_for_are_refused(grid, make_model, tmp_path):
    model = quantize(make_model(), Recipe(grid))
    with pytest.raises(Unexportable, match=r"layers\.0\.self_attn\.q_proj: compressed-tensors holds .*, not "):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
