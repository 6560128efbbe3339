"""Models that hold as much of their weights as there is memory for: one checkpoint, loaded to any size (BitStack).

A checkpoint of `SignLowRankStack` layers has a tensor for each part of each block, so the header of its files is a seek
table: a model of fewer blocks is some of the tensors. `from_pretrained` loads all of them, as it does any checkpoint.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

from tersor.quant.checkpoint import TersorConfig, schemes_in
from tersor.quant.grid import SignLowRankStack
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.shards import Source

_FILE = "stack_order.json"


def stacks(model: Any) -> dict[str, QuantizedLinear]:
    """The layers of `model` that are stacks of blocks, by name.

    Raises:
        ValueError: there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and isinstance(module.scheme.grid, SignLowRankStack)
    }
    if not found:
        raise ValueError(
            f"no layer of {type(model).__name__} is a SignLowRankStack; quantise with recipes.bitstack() first"
        )
    return found


def with_blocks(layer: QuantizedLinear, blocks: int, further: Mapping[str, Tensor] | None = None) -> QuantizedLinear:
    """`layer` with so many blocks; those that it does not hold come from `further`, buffers by name."""
    grid: Any = layer.scheme.grid
    scheme = replace(layer.scheme, grid=replace(grid, blocks=blocks))
    buffers = dict(layer.named_buffers()) | dict(further or {})
    made = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, scheme, "meta")
    device = next(layer.buffers()).device
    for name in made.layout():
        setattr(made, name, buffers[name].to(device))
    made.bias = layer.bias
    return made


@dataclass(frozen=True)
class StackTable:
    """What a checkpoint says of its stacks.

    Args:
        least_nbytes: of the model with one block of each layer: all parameters and buffers that are saved.
        block_nbytes: of one more block of each layer.
        order: layers, each once for every further block, in the order in which they are loaded.
    """

    least_nbytes: int
    block_nbytes: dict[str, int]
    order: list[str]

    def nbytes(self, steps: int) -> int:
        """Of the model with so many steps of the order."""
        return self.least_nbytes + sum(self.block_nbytes[name] for name in self.order[:steps])

    def steps(self, budget: int) -> int:
        """How much of the order a budget of so many bytes pays for.

        Raises:
            ValueError: not even for what comes before.
        """
        if budget < self.least_nbytes:
            raise ValueError(
                f"budget = {budget} bytes is too small: with one block of each layer the model takes {self.least_nbytes}"
            )
        costs = (self.block_nbytes[name] for name in self.order)
        return bisect_right(list(accumulate(costs, initial=self.least_nbytes)), budget) - 1

    def blocks(self, steps: int) -> dict[str, int]:
        """Of each layer, after so many steps."""
        further = Counter(self.order[:steps])
        return {name: 1 + further[name] for name in self.block_nbytes}


def save_stack(model: Any, directory: str | Path, order: Sequence[str]) -> None:
    """Write a model quantised with `recipes.bitstack` for `load_stack`, and for `from_pretrained`.

    Args:
        order: see `StackTable`; `StackOrder().order(model, text)` finds a good one.

    Raises:
        ValueError: a layer is not as often in `order` as it has blocks beyond the first.
    """
    layers, times = stacks(model), Counter(order)
    for name in layers.keys() | times.keys():
        wanted = layers[name].scheme.grid.blocks - 1 if name in layers else 0
        if times[name] != wanted:
            raise ValueError(f"order names {name!r} {times[name]} times, where {wanted} blocks are to be ordered")
    block_nbytes = {name: _block_nbytes(layer) for name, layer in layers.items()}
    further = sum(block_nbytes[name] for name in order)
    table = StackTable(_nbytes(model) - further, block_nbytes, list(order))
    model.save_pretrained(directory)
    (Path(directory) / _FILE).write_text(json.dumps(asdict(table), indent=1) + "\n")


def load_stack(directory: str | Path, budget: int) -> "Stack":
    """What `save_stack` wrote, as far as `budget` bytes of memory go; nothing else is read.

    Raises:
        ValueError: the budget is less than the model takes with one block of each layer; the directory holds no stack.
    """
    directory = Path(directory)
    if not (directory / _FILE).is_file():
        raise ValueError(
            f"{directory} has no {_FILE}; write the model with save_stack, or load it with from_pretrained"
        )
    table, source = StackTable(**json.loads((directory / _FILE).read_text())), Source(directory)
    steps = table.steps(budget)
    config = AutoConfig.from_pretrained(directory)
    left_out: set[str] = set()
    schemes: list[dict[str, Any]] = []
    layers: dict[str, int] = {}
    # config.json speaks of all blocks
    stored = TersorConfig(**config.quantization_config)
    for name, index in stored.layers.items():
        pieces = stored.schemes[index]
        if name in table.block_nbytes:
            grid, blocks = Scheme.from_dict(pieces).grid, table.blocks(steps)[name]
            left_out |= set(_buffers(name, grid, blocks, grid.blocks))
            pieces = pieces | {"grid": pieces["grid"] | {"blocks": blocks}}
        if pieces not in schemes:
            schemes.append(pieces)
        layers[name] = schemes.index(pieces)
    config.quantization_config |= {"schemes": schemes, "layers": layers}
    tensors = source.tensors(source.files.keys() - left_out)
    # AutoModelForCausalLM itself takes no tensors
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=tensors)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return Stack(model, source, table, steps)


class Stack:
    """A model that holds the first blocks of its layers' stacks, and where the others are.

    Args:
        model: one like any other: it runs, generates, and `save_pretrained` writes what it holds.
    """

    def __init__(self, model: Any, source: Source, table: StackTable, steps: int) -> None:
        self.model = model
        self._source, self._table, self._steps = source, table, steps

    @property
    def nbytes(self) -> int:
        """Of the model's parameters and buffers, those that are saved."""
        return self._table.nbytes(self._steps)

    @property
    def blocks(self) -> dict[str, int]:
        """Held of each layer."""
        return self._table.blocks(self._steps)

    def grow(self, budget: int) -> None:
        """Read as many further blocks as fit into `budget` bytes together with what is held; nothing is dropped."""
        self._hold(max(self._steps, self._table.steps(budget)))

    def shrink(self, budget: int) -> None:
        """Drop blocks until the model fits into `budget` bytes; nothing is read.

        Raises:
            ValueError: it cannot; nothing was dropped.
        """
        self._hold(min(self._steps, self._table.steps(budget)))

    def _hold(self, steps: int) -> None:
        before, after, layers = self.blocks, self._table.blocks(steps), stacks(self.model)
        changed = [name for name, blocks in after.items() if blocks != before[name]]
        wanted = [
            buffer for name in changed for buffer in _buffers(name, layers[name].scheme.grid, before[name], after[name])
        ]
        tensors = self._source.tensors(wanted)
        for name in changed:
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            self.model.set_submodule(name, with_blocks(layers[name], after[name], own))
        self._steps = steps
        config = self.model.config.quantization_config
        config.schemes, config.layers = schemes_in(self.model)


def _buffers(name: str, grid: Any, start: int, stop: int) -> list[str]:
    """Names of the tensors of some blocks of layer `name`."""
    return [f"{name}.{buffer}" for block in range(start, stop) for buffer in grid.block_buffers(block)]


def _block_nbytes(layer: QuantizedLinear) -> int:
    return sum(layer.stored()[name].nbytes for name in layer.scheme.grid.block_buffers(0))


def _nbytes(model: torch.nn.Module) -> int:
    # tied ones count once
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
