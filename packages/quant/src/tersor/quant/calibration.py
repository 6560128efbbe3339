"""What the inputs of a layer look like: second moments, collected block by block."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class SecondMoments:
    """Running mean of x x^T over tokens, float32; two of them merge by adding."""

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self.mean = torch.zeros(in_features, in_features, device=device)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Take in the rows of `x` (tokens, in)."""
        total = self.count + len(x)
        if total:
            # a mean, not a sum: sums over many tokens would lose the later ones' low bits
            self.mean.mul_(self.count / total).addmm_(x.float().T, x.float(), alpha=1 / total)
        self.count = total

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        merged = SecondMoments(len(self.mean), self.mean.device)
        merged.count = self.count + other.count
        if merged.count:
            merged.mean = (self.mean * self.count + other.mean * other.count) / merged.count
        return merged


def batches(calibration: Any) -> list[Batch]:
    """Calibration data as one mapping of model inputs per sequence batch.

    Args:
        calibration: token ids (sequences, seq_len), an iterable of such, or an iterable of mappings with `input_ids`
            and, where sequences are padded, `attention_mask`.

    Raises:
        TypeError: it is nothing of these.
        ValueError: it is empty.
    """
    rows: Iterable[Any] = (
        calibration.split(1) if isinstance(calibration, Tensor) and calibration.ndim == 2 else calibration
    )
    found: list[Batch] = []
    for row in rows:
        if isinstance(row, Tensor):
            found.append({"input_ids": row if row.ndim == 2 else row[None]})
        elif isinstance(row, Mapping) and "input_ids" in row:
            found.append(dict(row))
        else:
            raise TypeError(f"calibration must hold token ids or mappings with input_ids, got {type(row).__name__}")
    if not found:
        raise ValueError("calibration is empty; give token ids of a few thousand tokens")
    return found


@dataclass
class BlockInputs:
    """What every block is called with, for one batch: the hidden states that it changes, and what all blocks share.

    Args:
        hidden: (batch, seq, hidden): the input of the next block.
        keywords: per block, its keyword arguments (masks, positions); blocks of one kind share the tensors.
        mask: (batch, seq), true where a token is no padding; None where nothing is padded.
    """

    hidden: Tensor
    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    keywords: list[dict[str, Any]] = field(default_factory=list)
    mask: Tensor | None = None

    def run(self, index: int, block: nn.Module) -> Tensor:
        """Output of block `index` for these inputs."""
        output = block(self.hidden, *self.arguments[index], **self.keywords[index])
        return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def block_inputs(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> BlockInputs:
    """One pass through the model, noting what each block is called with (models give each kind its own mask)."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    noted = BlockInputs(torch.empty(0), mask=None if mask is None or bool(mask.all()) else mask)

    def note(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden, *rest = arguments or (keywords.pop("hidden_states"),)
        if not noted.keywords:
            noted.hidden = hidden
        noted.arguments.append(tuple(rest))
        noted.keywords.append(keywords)

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return noted


@contextmanager
def collecting(linears: Mapping[str, nn.Linear]) -> Iterator[tuple[dict[str, SecondMoments], list[Tensor | None]]]:
    """Inside, every call of one of `linears` adds its inputs to its moments; linears of one input share the object.

    Yields the moments by name, and a list whose one entry is the padding mask of the batch that is running.
    """
    moments: dict[str, SecondMoments] = {}
    mask: list[Tensor | None] = [None]
    # the inputs of this call, kept alive: a freed tensor's address would be taken for the same input
    recent: list[tuple[Tensor, SecondMoments]] = []

    def take(name: str, linear: nn.Linear, x: Tensor) -> None:
        for tensor, shared in recent:
            if tensor is x and (name not in moments or moments[name] is shared):
                moments[name] = shared
                return
        mine = moments.setdefault(name, SecondMoments(linear.in_features, x.device))
        rows = x if mask[0] is None or x.shape[:-1] != mask[0].shape else x[mask[0]]
        mine.update(rows.reshape(-1, linear.in_features))
        recent.append((x, mine))

    def hook(name: str):
        return lambda linear, arguments: take(name, linear, arguments[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    clear = next(iter(linears.values())).register_forward_pre_hook(lambda *_: recent.clear(), prepend=True)
    try:
        yield moments, mask
    finally:
        for handle in (*handles, clear):
            handle.remove()
