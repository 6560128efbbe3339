"""What goes into a layer: calibration data, the inputs of blocks, the second moments of the inputs of linears."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from tersor.quant.processes import num_processes, over_processes

# rows of token ids are run together up to this many tokens
_BATCH_TOKENS = 2048
# columns of X^T X that are multiplied at once: within a tenth of the fastest of 64, 128, 256 on a CPU, for 256 to 2048 inputs
_STRIPE = 128


class SecondMoments:
    """Sum of x x^T over tokens, their count, and max |x_j|; what two parts of the data gave merges by addition."""

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        # float64: in a sum over many tokens float32 would lose the low bits of the later ones
        # what lies below the diagonal is filled in when it is asked for
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(in_features, device=device)  # of magnitudes
        self.count = 0

    @property
    def sum(self) -> Tensor:
        """X^T X, (in, in), float64, symmetric to the last bit."""
        # in place: the matrix may be the largest thing in memory
        for start in range(0, len(self._upper), _STRIPE):
            stripe, below = slice(start, start + _STRIPE), slice(start + _STRIPE, None)
            square = self._upper[stripe, stripe]
            square.copy_(square.triu() + square.triu(1).T)
            self._upper[below, stripe] = self._upper[stripe, below].T
        return self._upper

    @property
    def mean(self) -> Tensor:
        """H = X^T X / tokens, (in, in)."""
        return self.sum / max(self.count, 1)

    def update(self, x: Tensor) -> None:
        """Take in the rows of `x` (tokens, in)."""
        x = x.float()
        # almost half of the products are spared
        for start in range(0, x.shape[1], _STRIPE):
            stripe = slice(start, start + _STRIPE)
            self._upper[stripe, start:] += x[:, stripe].T @ x[:, start:]
        if len(x):
            self.maxima = self.maxima.maximum(x.abs().amax(0))
        self.count += len(x)

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        merged = SecondMoments(len(self._upper), self._upper.device)
        merged._upper = self._upper + other._upper
        merged.maxima = self.maxima.maximum(other.maxima)
        merged.count = self.count + other.count
        return merged

    def merge(self) -> None:
        """Add what the other processes have seen, where `torch.distributed` runs: all of them then hold the same."""
        over_processes(self._upper)
        over_processes(self.maxima, "MAX")
        self.count = int(over_processes(torch.tensor([self.count], device=self._upper.device)))


def own_part(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What this process runs of `data`: every n-th row where `torch.distributed` runs n processes.

    Raises:
        ValueError: there are fewer rows than processes.
    """
    if (processes := num_processes()) == 1:
        return data
    rank = distributed.get_rank()
    parts, seen = [], 0
    for batch in data:
        first = (rank - seen) % processes
        seen += len(batch["input_ids"])
        parts.append({name: tensor[first::processes] for name, tensor in batch.items()})
    if seen < processes:
        raise ValueError(f"calibration has {seen} sequences for {processes} processes; give more, or start fewer")
    return [part for part in parts if len(part["input_ids"])]


def batches(calibration: Any) -> list[dict[str, Tensor]]:
    """Calibration data as inputs of the model, a dictionary per batch.

    Args:
        calibration: token ids (sequences, seq_len), an iterable of such or of single sequences, or an iterable of
            mappings with `input_ids` and, where sequences are padded, `attention_mask`.

    Raises:
        TypeError: it is nothing of these.
        ValueError: it is empty.
    """
    if isinstance(calibration, Tensor) and calibration.ndim == 2:
        calibration = calibration.split(max(1, _BATCH_TOKENS // max(1, calibration.shape[1])))
    found = [_batch(part) for part in _iterate(calibration)]
    if not sum(batch["input_ids"].numel() for batch in found):
        raise ValueError("calibration is empty; give token ids of a few thousand tokens")
    return found


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that are no padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def _iterate(calibration: Any) -> Iterable[Any]:
    if isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | Mapping):
        return calibration
    raise TypeError(
        f"calibration must be token ids (sequences, seq_len), or an iterable of token ids or mappings with input_ids; "
        f"got {type(calibration).__name__}"
    )


def _batch(part: Any) -> dict[str, Tensor]:
    if isinstance(part, Tensor):
        part = {"input_ids": part if part.ndim == 2 else part[None]}
    if not isinstance(part, Mapping) or not isinstance(part.get("input_ids"), Tensor):
        raise TypeError(f"calibration must hold token ids or mappings with input_ids, got {type(part).__name__}")
    if part["input_ids"].ndim != 2 or part["input_ids"].is_floating_point():
        ids = part["input_ids"]
        raise TypeError(f"token ids must be integers (sequences, seq_len), got {ids.dtype} {tuple(ids.shape)}")
    # the base model computes no loss
    return {name: tensor for name, tensor in part.items() if name != "labels"}


@dataclass
class BlockInputs:
    """What every block is called with, for one batch: the hidden states that it changes, and what the model adds.

    Args:
        hidden: (batch, seq, hidden), the input of the next block.
        arguments, keywords: per block, what it is called with besides (masks, positions).
        mask: (batch, seq), true where a token is no padding; None where nothing is padded.
        shapes: of the hidden states that the model gave to its blocks.
    """

    hidden: Tensor
    mask: Tensor | None
    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    keywords: list[dict[str, Any]] = field(default_factory=list)
    shapes: set[torch.Size] = field(default_factory=set)

    def run(self, index: int, block: nn.Module) -> Tensor:
        """Output of block `index` for these inputs."""
        output = block(self.hidden, *self.arguments[index], **self.keywords[index])
        return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def block_inputs(model: Any, blocks: Iterable[nn.Module], data: Iterable[Mapping[str, Tensor]]) -> list[BlockInputs]:
    """One pass of every batch through the model, noting what its blocks are called with."""
    with _noting(model, blocks) as noted:
        return [noted(batch) for batch in data]


@torch.no_grad()
def first_inputs(
    model: Any, blocks: nn.ModuleList, data: Sequence[Mapping[str, Tensor]], waiting: Collection[Any]
) -> list[BlockInputs]:
    """The same, without running more blocks than the first where that shows in nothing that is noted.

    A batch is run whole as long as something is `waiting` to be called; and so are all, if on the first sequence blocks
    were given anything by those before them but hidden states of one shape.
    """
    found, alike, sequence = [], False, data[0]
    if sequence.keys() <= {"input_ids", "attention_mask"}:
        # of what else a model takes, nobody knows where its sequences are
        sequence = {name: tensor[:1] for name, tensor in sequence.items()}
    with _noting(model, blocks) as noted:
        whole = noted(sequence)
        if len(whole.shapes) == 1:
            with passed_through(blocks):
                alike = _same_arguments(whole, noted(sequence))
        for batch in data:
            with passed_through(blocks) if alike and not waiting else nullcontext():
                found.append(noted(batch))
    return found


@contextmanager
def passed_through(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, all blocks but the first give back the hidden states that they are called with."""
    form: list[Any] = []

    def through(*arguments: Any, **keywords: Any) -> Any:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        return hidden if isinstance(form[-1], Tensor) else (hidden, *form[-1][1:])

    handle = blocks[0].register_forward_hook(lambda block, arguments, output: form.append(output))
    for block in blocks[1:]:
        block.forward = through
    try:
        yield
    finally:
        handle.remove()
        for block in blocks[1:]:
            del block.forward


def _same_arguments(one: BlockInputs, other: BlockInputs) -> bool:
    """Of two that were noted together, so that tensors that are equal are one."""
    leaves, others = (pytree.tree_leaves((each.arguments, each.keywords)) for each in (one, other))
    return len(leaves) == len(others) and all(
        a is b or (isinstance(a, bool | int | float | str) and a == b) for a, b in zip(leaves, others)
    )


@contextmanager
def _noting(model: Any, blocks: Iterable[nn.Module]) -> Iterator[Callable[[Mapping[str, Tensor]], BlockInputs]]:
    """Inside, there is a function that runs the model on a batch and gives what its blocks were called with."""
    known: list[Tensor] = []

    def shared(value: Any) -> Any:
        """`value`, or an equal tensor that was noted before: masks and positions mostly repeat."""
        if not isinstance(value, Tensor):
            return value
        for tensor in known:
            same_kind = tensor.shape == value.shape and tensor.dtype == value.dtype
            if tensor is value or (same_kind and torch.equal(tensor, value)):
                return tensor
        known.append(value)
        return value

    def note(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden, *rest = arguments or (keywords.pop("hidden_states"),)
        if not noted.keywords:
            noted.hidden = hidden
        noted.shapes.add(hidden.shape)
        noted.arguments.append(pytree.tree_map(shared, tuple(rest)))
        noted.keywords.append(pytree.tree_map(shared, keywords))

    def run(batch: Mapping[str, Tensor]) -> BlockInputs:
        nonlocal noted
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        noted = BlockInputs(torch.empty(0), None if mask is None or bool(mask.all()) else mask)
        # the base model: without the head there are no logits, which may be larger than all else
        model.base_model(**inputs, use_cache=False)
        return noted

    noted: BlockInputs
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


class SharedInput(NamedTuple):
    """Linears that a block gives one and the same tensor to, and how often in one pass."""

    names: list[str]
    calls: int


def shared_inputs(linears: Mapping[str, nn.Linear], run: Callable[[], Any]) -> list[SharedInput]:
    """The linears, grouped by their input, in the order in which `run` calls them; those that it does not call come last."""
    # tensors are kept: the address of a freed one would be taken for the same input
    inputs: list[tuple[Tensor, list[str]]] = []
    calls: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        for tensor, names in inputs:
            if tensor is x:
                names.append(name)
                return
        inputs.append((x, [name]))

    with _before_calls(linears, note):
        run()
    groups = [*(names for _, names in inputs), *([name] for name in linears if name not in calls)]
    return [SharedInput(names, calls[names[0]]) for names in groups]


# what to run, and its padding mask (batch, seq), true where a token counts
Pass = tuple[Callable[[], Any], Tensor | None]


def block_passes(block: nn.Module, inputs: Iterable[BlockInputs], index: int) -> list[Pass]:
    """A pass through block `index` for each batch."""
    return [(partial(each.run, index, block), each.mask) for each in inputs]


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` (..., features) as (tokens, features), those that `mask` (batch, seq) calls padding left out."""
    found = x.reshape(-1, x.shape[-1])
    # an expert is given fewer rows, none of them for padding alone
    return found if mask is None or len(found) != mask.numel() else found[mask.flatten()]


class _SeenAll(Exception):
    """Ends a pass through a block that has nothing more to show."""


def second_moments(linear: nn.Linear, calls: int, passes: Iterable[Pass]) -> SecondMoments:
    """Second moments of what `linear` is given in all of `passes`.

    Args:
        calls: of `linear` in each pass, which is ended after the last one.
    """
    moments = SecondMoments(linear.in_features, linear.weight.device)

    def collecting(mask: Tensor | None, calls_left: int) -> Callable[[str, Tensor], None]:
        def take(_: str, x: Tensor) -> None:
            nonlocal calls_left
            moments.update(token_rows(x, mask))
            calls_left -= 1
            if not calls_left:
                raise _SeenAll

        return take

    for run, mask in passes:
        with _before_calls({"": linear}, collecting(mask, calls)), suppress(_SeenAll):
            run()
    return moments


@contextmanager
def _before_calls(linears: Mapping[str, nn.Linear], do: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda linear, arguments: do(name, arguments[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
