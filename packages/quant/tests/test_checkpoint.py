"""Checkpoints: what is saved is loaded bit for bit, by plain transformers calls, in any process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tersor.quant import quantize, recipes
from tersor.quant.checkpoint import FORMAT_VERSION, UnsupportedCheckpoint, register
from tersor.quant.linear import QuantizedLinear

GRIDS = [
    (bits, group_size, symmetric) for bits in range(1, 9) for group_size in (32, None) for symmetric in (False, True)
]


@pytest.fixture
def saved(make_model, ids, tmp_path) -> tuple[PreTrainedModel, Path]:
    model = quantize(make_model(), recipes.gptq(4, 32), ids)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def edit(directory: Path, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_every_grid_comes_back_bit_for_bit(bits, group_size, symmetric, make_model, ids, tmp_path):
    model = quantize(make_model("gemma3"), recipes.rtn(bits, group_size, symmetric))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_model_comes_back_bit_for_bit(kind, dtype, make_model, ids, tmp_path):
    model = quantize(make_model(kind, dtype), recipes.gptq(3, 32), ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    tied = loaded.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


IN_A_NEW_PROCESS = """
import sys
import torch
import tersor.quant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[1]))
for directory in sys.argv[2:]:
    model, seen = AutoModelForCausalLM.from_pretrained(directory), load_file(directory + "/seen.safetensors")
    with torch.no_grad():
        assert torch.equal(model(seen["ids"]).logits, seen["logits"]), directory
print("equal")
"""


def test_a_new_process_loads_the_same_bits(make_model, ids, tmp_path):
    directories = []
    for kind, dtype in (("llama", torch.float32), ("gemma3", torch.bfloat16), ("qwen2", torch.float32)):
        for recipe in (recipes.gptq(4, 32), recipes.gptq(3, None, symmetric=True)):
            model = quantize(make_model(kind, dtype), recipe, ids)
            directories.append(tmp_path / str(len(directories)))
            model.save_pretrained(directories[-1])
            seen = {"ids": ids, "logits": logits(model, ids).contiguous()}
            save_file(seen, directories[-1] / "seen.safetensors")
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(torch.get_num_threads()), *map(str, directories)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr


def test_what_was_loaded_saves_the_same_files(saved, tmp_path):
    _, directory = saved
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_shards_are_loaded_too(saved, ids, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), ids), logits(model, ids))


def test_tensors_are_saved_as_safetensors_and_as_small_as_they_are_held(saved):
    model, directory = saved
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    stored = load_file(directory / "model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in layers.items():
        assert f"{name}.weight" not in stored
        assert sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}.")) == layer.nbytes


def test_the_config_tells_the_version_the_recipe_and_the_grid_of_every_layer(make_model, ids, tmp_path):
    model = quantize(make_model(), recipes.gptq(3, 16, symmetric=True), ids, keep=["o_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    grid = {"type": "IntGrid", "bits": 3, "group_size": 16, "symmetric": True, "restricted": False, "float_zero": False}
    assert (config["quant_method"], config["format_version"]) == ("tersor", FORMAT_VERSION)
    assert config["recipe"]["grid"] == grid
    assert config["recipe"]["solver"]["type"] == "GPTQ"
    assert config["schemes"] == [{"grid": grid}]
    assert set(config["layers"]) == {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert "model.layers.0.self_attn.o_proj" not in config["layers"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.o_proj) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"], ids=str)
def test_no_dtype_asked_for_changes_the_weights(dtype, saved):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    for ours, theirs in zip(model.modules(), loaded.modules()):
        if isinstance(ours, QuantizedLinear):
            assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_a_device_map_is_followed(saved, ids):
    pytest.importorskip("accelerate")
    model, directory = saved
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)
        assert torch.equal(logits(loaded.to("cpu"), ids), logits(model, ids))


def test_a_model_without_head_loads_the_blocks(saved, ids):
    model, directory = saved
    base = AutoModel.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_model_with_head_loads_what_was_saved_without(saved, ids, tmp_path):
    model, directory = saved
    AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.codes, model.model.layers[0].mlp.up_proj.codes)


def test_it_becomes_a_plain_model_again(saved, ids, tmp_path):
    model, directory = saved
    plain = AutoModelForCausalLM.from_pretrained(directory)
    plain.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_checkpoint_of_a_later_version_is_refused(saved):
    _, directory = saved
    edit(directory, lambda config: config.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(UnsupportedCheckpoint, match=f"version {FORMAT_VERSION + 1}.* reads {FORMAT_VERSION}:"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_grid_of_a_later_version_is_refused(saved):
    _, directory = saved
    edit(directory, lambda config: config["schemes"][0]["grid"].update(type="MidriseGrid"))
    with pytest.raises(UnsupportedCheckpoint, match="uses 'MidriseGrid', which this tersor.quant does not have"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_config_of_another_model_is_refused(saved):
    _, directory = saved
    edit(directory, lambda config: config["layers"].update({"model.layers.9.mlp.up_proj": 0}))
    with pytest.raises(UnsupportedCheckpoint, match=r"layers\.9\.mlp\.up_proj, which is no linear of LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_tensors_of_another_grid_are_refused(saved):
    _, directory = saved
    edit_tensors(directory, lambda t: t.update({"model.layers.1.mlp.up_proj.codes": torch.zeros(5, 3).to(torch.uint8)}))
    with pytest.raises((UnsupportedCheckpoint, RuntimeError), match="codes must be|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel])
def test_missing_tensors_are_named(load, saved):
    """transformers alone would take what memory holds for codes."""
    _, directory = saved
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.codes"))
    with pytest.raises(UnsupportedCheckpoint, match="lacks 1 tensors of quantised layers, model.* for one"):
        load.from_pretrained(directory)


def test_a_quantised_checkpoint_is_not_quantised_again(saved):
    _, directory = saved
    with pytest.raises(ValueError, match="quantised already"):
        quantize(AutoModelForCausalLM.from_pretrained(directory), recipes.rtn(4, 32))


def test_registering_twice_changes_nothing(saved):
    register()
    AutoModelForCausalLM.from_pretrained(saved[1])
