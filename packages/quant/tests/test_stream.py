"""Checkpoints quantised block by block: the same bits as in memory, after a kill too, in the memory of two blocks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tersor.quant import quantize, recipes
from tersor.quant.grid import IntGrid
from tersor.quant.stream import quantize_checkpoint
from tersor.quant.transform import Smooth

RECIPES = {"rtn": recipes.rtn(3, 32), "gptq": recipes.gptq(4, 32, symmetric=True)}


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def source(make_model, tmp_path) -> Path:
    make_model("gemma3").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(("name", "dtype"), [("rtn", torch.float32), ("gptq", torch.bfloat16)], ids=str)
def test_streamed_equals_quantised_in_memory(name, dtype, kind, make_model, ids, tmp_path):
    model = make_model(kind, dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    quantize_checkpoint(tmp_path / "source", tmp_path / "streamed", RECIPES[name], ids, keep=["layers.0.*.v_proj"])
    whole = quantize(
        AutoModelForCausalLM.from_pretrained(tmp_path / "source"), RECIPES[name], ids, keep=["layers.0.*.v_proj"]
    )
    whole.save_pretrained(tmp_path / "whole")
    streamed, saved = tensors_in(tmp_path / "streamed"), tensors_in(tmp_path / "whole")
    assert streamed.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(streamed[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / file).read_text() == (tmp_path / "whole" / file).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)


def test_changes_of_blocks_are_written_with_them(source, ids, tmp_path):
    recipe = replace(RECIPES["rtn"], transforms=(Smooth(),))
    quantize_checkpoint(source, tmp_path / "streamed", recipe, ids)
    quantize(AutoModelForCausalLM.from_pretrained(source), recipe, ids).save_pretrained(tmp_path / "whole")
    streamed, saved, was = (tensors_in(tmp_path / name) for name in ("streamed", "whole", "source"))
    assert all(torch.equal(streamed[key], tensor) for key, tensor in saved.items())
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(streamed[norm], was[norm])


def test_padding_and_layers_of_other_grids_are_followed(source, ids, tmp_path):
    mask = torch.ones_like(ids)
    mask[::2, -7:] = 0
    data, grids = [{"input_ids": ids, "attention_mask": mask}], {"model.layers.1.mlp.up_proj": IntGrid(8, 16)}
    quantize_checkpoint(source, tmp_path / "streamed", RECIPES["gptq"], data, allocation=grids)
    quantize(AutoModelForCausalLM.from_pretrained(source), RECIPES["gptq"], data, allocation=grids).save_pretrained(
        tmp_path / "whole"
    )
    streamed, saved = tensors_in(tmp_path / "streamed"), tensors_in(tmp_path / "whole")
    assert all(torch.equal(streamed[key], tensor) for key, tensor in saved.items())


def test_the_tokenizer_goes_with_the_model(tiny_lm_path, tmp_path):
    quantize_checkpoint(tiny_lm_path, tmp_path / "out", recipes.rtn(4, 64))
    text = "It was the best of times."
    expected = AutoTokenizer.from_pretrained(tiny_lm_path)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == expected
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


class Stopped(Exception):
    pass


def stop_at(layer: int):
    def progress(done, total, name):
        if done == layer:
            raise Stopped(name)

    return progress


@pytest.mark.parametrize(("name", "layer"), [("rtn", 10), ("gptq", 3), ("gptq", 7), ("gptq", 14)])
def test_stopped_and_resumed_gives_the_same_files(name, layer, source, ids, tmp_path):
    quantize_checkpoint(source, tmp_path / "straight", RECIPES[name], ids)
    with pytest.raises(Stopped):
        quantize_checkpoint(source, tmp_path / "out", RECIPES[name], ids, progress=stop_at(layer))
    assert not (tmp_path / "out").exists()
    again = []
    quantize_checkpoint(source, tmp_path / "out", RECIPES[name], ids, progress=lambda *at: again.append(at))
    # a block has 7 layers; a shard is written after its last one was reported
    first = 1 if layer <= 7 else 8
    assert [done for done, _, _ in again] == list(range(first, 15))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "straight", "out"}


KILLED = """
import os, signal, sys
import torch
from safetensors.torch import load_file
from tersor.quant import recipes
from tersor.quant.stream import quantize_checkpoint

torch.set_num_threads(int(sys.argv[3]))

def progress(done, total, name):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(sys.argv[1], sys.argv[2], recipes.rtn(3, 32), progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_killed_and_resumed_gives_the_same_files(source, tmp_path):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(torch.get_num_threads())]
    assert subprocess.run(command, capture_output=True).returncode == -9
    for target in ("out", "straight"):
        quantize_checkpoint(source, tmp_path / target, RECIPES["rtn"])
    assert files_in(tmp_path / "out") == files_in(tmp_path / "straight")


MEMORY = """
import sys
from pathlib import Path
from tersor.quant import recipes
from tersor.quant.stream import quantize_checkpoint

def most(source):
    seen = []

    def progress(*_):
        pages = Path("/proc/self/statm").read_text().split()[1]
        seen.append(int(pages) * 4096)

    quantize_checkpoint(source, source + "-out", recipes.rtn(4, 64), progress=progress)
    return max(seen)

few = most(sys.argv[1])
print(most(sys.argv[2]) - few)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the kernel does not tell what is in memory")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 64}
    for blocks in (3, 23):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks))
        block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
        model.save_pretrained(tmp_path / str(blocks))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "3"), str(tmp_path / "23")]
    # what is freed goes back at once: the C library would keep some of it, to use it again
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert int(run.stdout) < 2 * block, run.stderr


def test_unfinished_work_of_another_recipe_source_or_data_is_refused(source, make_model, ids, tmp_path):
    with pytest.raises(Stopped):
        quantize_checkpoint(source, tmp_path / "out", RECIPES["gptq"], ids, progress=stop_at(8))
    for change, recipe, data, keep in (
        ("recipe", recipes.gptq(3, 32), ids, ()),
        ("calibration", RECIPES["gptq"], ids.flip(0), ()),
        ("keep", RECIPES["gptq"], ids, ["o_proj"]),
    ):
        with pytest.raises(
            ValueError, match=rf"\.out\.unfinished holds unfinished work with another {change}; finish that"
        ):
            quantize_checkpoint(source, tmp_path / "out", recipe, data, keep=keep)
    other = make_model("gemma3")
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(source)
    with pytest.raises(ValueError, match="another source"):
        quantize_checkpoint(source, tmp_path / "out", RECIPES["gptq"], ids)


class WholeModel:
    needs_hessian = False

    def fold(self, model):
        pass


def test_bad_sources_and_recipes_are_named_before_anything_is_written(source, make_model, ids, tmp_path):
    def expect(error, match, *args, **kwargs):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(error, match=match):
            quantize_checkpoint(*args, **kwargs)
        assert {path.name for path in tmp_path.iterdir()} == before

    out, rtn = tmp_path / "out", RECIPES["rtn"]
    expect(ValueError, "this recipe learns from data", source, out, RECIPES["gptq"])
    expect(ValueError, "is not a multiple of group_size = 48", source, out, recipes.rtn(4, 48))
    expect(
        NotImplementedError,
        "WholeModel needs all blocks at once",
        source,
        out,
        replace(rtn, transforms=(WholeModel(),)),
    )
    expect(FileExistsError, "source exists already", source, source, rtn)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").touch()
    expect(ValueError, r"holds no model.safetensors .*, but pytorch_model.bin", tmp_path / "pickled", out, rtn)
    quantize(make_model(), rtn).save_pretrained(tmp_path / "quantised")
    expect(ValueError, "quantised is quantised already; start from the original", tmp_path / "quantised", out, rtn)
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/config.json").write_bytes((source / "config.json").read_bytes())
    codes = load_file(source / "model.safetensors")
    codes["model.layers.1.mlp.up_proj.weight"] = codes["model.layers.1.mlp.up_proj.weight"].char()
    save_file(codes, tmp_path / "codes/model.safetensors")
    expect(ValueError, r"up_proj\.weight is torch.int8, as of a quantised checkpoint", tmp_path / "codes", out, rtn)
    broken = make_model()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    expect(ValueError, r"layers\.1\.mlp\.up_proj\.weight holds NaN", tmp_path / "broken", out, rtn)
    make_model().model.save_pretrained(tmp_path / "base")
    expect(ValueError, "has no tensor lm_head.weight, as LlamaForCausalLM names it", tmp_path / "base", out, rtn)


def test_what_is_written_belongs_to_one_index(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", RECIPES["rtn"])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_in(tmp_path / "out").keys()
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
