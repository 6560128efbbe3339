"""GPTQ's and AWQ's files: decoded from their description, bit by bit, they are our weights."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.export import Unexportable, export
from tersor.quant.export.layers import quantized
from tersor.quant.grid import IntGrid


def integers(words, bits) -> list[int]:
    """What a stream of words holds, the lowest bits of the first word first: one long number, digit by digit."""
    number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [number >> bits * i & 2**bits - 1 for i in range(32 * len(words) // bits)]


def gptq_weight(tensors, bits, offset) -> torch.Tensor:
    codes = torch.tensor([integers(column, bits) for column in tensors["qweight"].T.tolist()])
    zero_points = torch.tensor([integers(row, bits) for row in tensors["qzeros"].tolist()]) + offset
    group = tensors["g_idx"].long()
    return (tensors["scales"].double()[group] * (codes.T - zero_points[group])).T


def awq_weight(tensors, group_size) -> torch.Tensor:
    def columns(words) -> torch.Tensor:
        values = torch.zeros(words.shape[0], 8 * words.shape[1], dtype=torch.int64)
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            values[:, column::8] = words.long() >> 4 * nibble & 15
        return values

    codes, zero_points = columns(tensors["qweight"]), columns(tensors["qzeros"])
    spread = tensors["scales"].double().repeat_interleave(group_size, 0)
    return (spread * (codes - zero_points.repeat_interleave(group_size, 0))).T


def layers_of(directory, names) -> dict[str, dict[str, torch.Tensor]]:
    tensors = load_file(directory / "model.safetensors")
    return {
        name: {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        for name in names
    }


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "engines on GPUs")
        yield


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, True), (32, False), (None, True), (16, False)])
def test_gptq_decodes_to_the_same_weights(bits, group_size, symmetric, make_model, tmp_path):
    model = quantize(make_model(), recipes.rtn(bits, group_size, symmetric))
    export(model, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group_size or -1, symmetric)
    # with zero points only the second version: the first cannot store a zero point of 0
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    layers = quantized(model)
    for name, tensors in layers_of(tmp_path / "out", layers).items():
        assert torch.equal(gptq_weight(tensors, bits, offset=int(symmetric)).float(), layers[name].dequantize())


def test_gptq_names_layers_of_other_grids_and_those_that_were_kept(make_model, tmp_path):
    grids = {"model.layers.0.mlp.up_proj": IntGrid(8, None, symmetric=True)}
    model = quantize(make_model(), recipes.rtn(4, 32), allocation=grids, keep=["layers.1.self_attn.v_proj"])
    export(model, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.1\.self_attn\.v_proj$": {},
    }
    # one model, one version of the format
    assert config["checkpoint_format"] == "gptq_v2"
    (tensors,) = layers_of(tmp_path / "out", grids).values()
    weight = quantized(model)["model.layers.0.mlp.up_proj"].dequantize()
    assert torch.equal(gptq_weight(tensors, 8, offset=0).float(), weight)


def test_gptq_says_when_engines_will_be_slow(make_model, tmp_path):
    model = quantize(make_model(), recipes.rtn(4, 32))
    with pytest.warns(
        UserWarning, match=r"slower kernels for 14 layers, model\.layers\.0\.self_attn\.q_proj and the like"
    ):
        export(model, tmp_path / "out", "gptq")


@pytest.mark.parametrize("group_size", [32, 16, None])
def test_awq_decodes_to_the_same_weights(group_size, make_model, tmp_path):
    model = quantize(make_model("qwen2"), recipes.rtn(4, group_size), keep=["layers.1.mlp"])
    export(model, tmp_path / "out", "awq")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["version"], config["bits"], config["group_size"]) == ("gemm", 4, group_size or -1)
    kept = {f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")} | {"lm_head"}
    assert set(config["modules_to_not_convert"]) == kept
    layers = quantized(model)
    for name, tensors in layers_of(tmp_path / "out", layers).items():
        width = group_size or layers[name].in_features
        assert torch.equal(awq_weight(tensors, width).float(), layers[name].dequantize())
        assert ("bias" in tensors) == (layers[name].bias is not None)


@pytest.mark.parametrize(
    ("format", "grid", "reason"),
    [
        ("gptq", IntGrid(5, 32), "wants 2, 3, 4 or 8 bits, got 5"),
        ("gptq", IntGrid(4, 32, float_zero=True), 'integer zero points, not .*float_zero=False, or export to "gguf"'),
        ("awq", IntGrid(4, 32, symmetric=True), "wants 4 bits with zero points"),
        ("awq", IntGrid(3, 32), "wants 4 bits with zero points"),
        ("awq", IntGrid(4, 32, float_zero=True), "integer zero points"),
    ],
)
def test_other_grids_are_refused(format, grid, reason, make_model, tmp_path):
    model = quantize(make_model(), Recipe(grid))
    with pytest.raises(Unexportable, match=rf"model\.layers\.0\.self_attn\.q_proj: .*{reason}"):
        export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_awq_takes_one_grid_for_all_layers(make_model, tmp_path):
    grids = {"model.layers.1.mlp.up_proj": IntGrid(4, 16)}
    model = quantize(make_model(), recipes.rtn(4, 32), allocation=grids)
    with pytest.raises(Unexportable, match=r"layers\.1\.mlp\.up_proj: AWQ's format wants one grid for all layers"):
        export(model, tmp_path / "out", "awq")
