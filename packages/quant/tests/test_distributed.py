"""Calibration shared among processes: the statistics of all are added up."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from tersor.quant import quantize, recipes
from tersor.quant.linear import QuantizedLinear

PROGRAM = """
import sys
from dataclasses import replace
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import AutoModelForCausalLM
from tersor.quant import quantize, recipes
from tersor.quant.transform import PermuteIntermediate
from tersor.quant.tuning import PV, BlockMSE

distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = load_file(sys.argv[1] + "/ids.safetensors")["ids"]
try:
    quantize(model, recipes.gptq(4, 32), ids[:1])
except ValueError as error:
    print(error)
quantize(model, recipes.gptq(4, 32), ids)
save_file(model.state_dict(), f"{sys.argv[1]}/rank{distributed.get_rank()}.safetensors")
experts = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/experts")
try:
    quantize(experts, recipes.gptq(4, 32), ids[:2, :2])
except ValueError as error:
    print(error)
quantize(experts, replace(recipes.gptq(4, 32), transforms=(PermuteIntermediate(),)), ids.split(1))
save_file(experts.state_dict(), f"{sys.argv[1]}/experts{distributed.get_rank()}.safetensors")
tuned = AutoModelForCausalLM.from_pretrained(sys.argv[1])
quantize(tuned, replace(recipes.gptq(2, 32), tuning=(BlockMSE(3), PV(3, 2))), ids)
save_file(tuned.state_dict(), f"{sys.argv[1]}/tuned{distributed.get_rank()}.safetensors")
distributed.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(make_model, ids, tmp_path):
    make_model().save_pretrained(tmp_path)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    # so many that the first sequences of the processes are not sent to the same ones
    experts = Qwen2MoeConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=97,
        num_experts=12,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2MoeForCausalLM(experts).save_pretrained(tmp_path / "experts")
    (tmp_path / "program.py").write_text(PROGRAM)
    rows = ids[:15]  # the processes get 8 and 7
    save_file({"ids": rows}, tmp_path / "ids.safetensors")
    alone = quantize(make_model(), recipes.gptq(4, 32), rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*command, str(tmp_path / "program.py"), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("calibration has 1 sequences for 2 processes") == 2
    assert run.stdout.count("saw no token of the calibration data") == 2
    for kind in ("rank", "experts", "tuned"):
        first, second = (load_file(tmp_path / f"{kind}{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), kind
    first = load_file(tmp_path / "rank0.safetensors")
    for name, layer in alone.named_modules():
        if isinstance(layer, QuantizedLinear):
            # sums in another order: hardly ever, a weight half-way between two levels falls to the other side
            assert (first[f"{name}.codes"] == layer.codes).float().mean() > 0.99, name
    tuned = load_file(tmp_path / "tuned0.safetensors")
    assert not torch.equal(tuned[norm := "model.layers.0.input_layernorm.weight"], make_model().state_dict()[norm])


ALLOCATING = """
import json
import sys
from pathlib import Path
from safetensors.torch import load_file
from torch import distributed
from transformers import AutoModelForCausalLM
from tersor.quant import recipes
from tersor.quant.allocation import DynamicProgram, Evolution, LayerDivergence, MaskSensitivity, MeasuredCost
from tersor.quant.allocation.candidates import candidates_of
from tersor.quant.grid import IntGrid

if len(sys.argv) > 2:
    distributed.init_process_group("gloo")
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = load_file(folder / "ids.safetensors")["ids"]
grids, recipe = [IntGrid(bits, 32) for bits in (2, 3, 4)], recipes.gptq(3, 32)
found = {"bits": [], "losses": [], "costs": []}
for allocator in (
    DynamicProgram(LayerDivergence()),
    Evolution(generations=4, offspring=8, survivors=(4, 1), tokens=(32, 128), initial=4),
):
    allocation = allocator.allocate(model, grids, recipe, ids, budget=grids[1])
    found["bits"].append([grid.bits for grid in allocation.values()])
with candidates_of(model, grids, recipe, ids, ()) as candidates:
    found["losses"] = [loss.losses(candidates) for loss in (LayerDivergence(), MaskSensitivity())]
    found["costs"] = MeasuredCost(repeats=5).costs(candidates)
rank = distributed.get_rank() if len(sys.argv) > 2 else "alone"
(folder / f"{rank}.json").write_text(json.dumps(found))
if len(sys.argv) > 2:
    distributed.destroy_process_group()
"""


def test_processes_agree_on_who_gets_which_grid(make_model, ids, tmp_path):
    """Each has seen another part of the data and measured for itself: what they find is averaged."""
    make_model().save_pretrained(tmp_path)
    save_file({"ids": ids[:4]}, tmp_path / "ids.safetensors")
    (tmp_path / "program.py").write_text(ALLOCATING)
    program = [str(tmp_path / "program.py"), str(tmp_path)]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program, "several"]
    for command in (several, [sys.executable, *program]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    first, second, alone = (json.loads((tmp_path / f"{who}.json").read_text()) for who in ("0", "1", "alone"))
    assert first == second
    assert all(len(set(bits)) == 3 for bits in first["bits"])
    # by all of the text, as one process does
    for together, expected in zip(first["losses"], alone["losses"]):
        for name, values in expected.items():
            assert together[name] == pytest.approx(values, rel=1e-2), name
