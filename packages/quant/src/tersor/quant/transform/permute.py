"""Channels in another order: those with outliers side by side, so that few blocks of them hold any.

Permuting is exact but for the order of sums. It folds where a channel's number means nothing: in the residual stream as a
whole, and between the projections of an MLP. Between values and outputs of attention channels cannot leave their head,
which is about as large as a block: nothing is gained there. Queries and keys are bound to their places by RoPE.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.quant.blocks import find_blocks, linears
from tersor.quant.calibration import BlockInputs, block_inputs, shared_inputs, token_rows
from tersor.quant.grid.protocol import Grid
from tersor.quant.processes import of_first_process, over_processes
from tersor.quant.transform.fold import Pair, find_pairs, norms
from tersor.quant.transform.protocol import UnsupportedFold
from tersor.quant.transform.rotation import close, trial_ids
from tersor.quant.transform.smooth import channel_maxima

# a parameter, and its dimension that is permuted
Side = tuple[Tensor, int]


@dataclass(frozen=True)
class PermuteResidual:
    """The residual stream's channels by their largest input to any layer that reads it (arXiv:2410.12168, section 3.2).

    One order must serve all norms and all that reads them, so the inputs behind each norm count in multiples of their
    median channel, and the largest of these over norms decides. Embeddings, norms, readers and writers of the stream are
    permuted; unlike rotations this passes norms with biases and behind branches.
    """

    @torch.no_grad()
    def fold_calibrated(self, model: Any, data: Sequence[Mapping[str, Tensor]]) -> None:
        """Permute `model`, which must be in evaluation mode.

        Raises:
            UnsupportedFold: the permuted model would not be the same; nothing was changed.
        """
        ids = trial_ids(model)
        expected = model(ids).logits
        sides, sources = _residual_stream(model, ids)
        order = _by_outliers(model, sources, data)
        _permute(sides, order)
        if not close(model(ids).logits, expected):
            _permute(sides, order.argsort())
            raise UnsupportedFold(
                f"{type(model).__name__}: permuting its residual stream does not leave its outputs as they are: leave "
                "PermuteResidual() out"
            )


@dataclass(frozen=True)
class PermuteIntermediate:
    """The channels between a block's projections by their largest values: rows of up and gate, columns of down.

    Found by trying: linears with the same input whose outputs, permuted alike, reach another linear permuted alike.
    """

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        if not self._found(block, inputs, index):
            raise UnsupportedFold(
                f"{type(block).__name__} has no linears whose channels can be permuted by what only one linear reads: leave "
                "PermuteIntermediate() out"
            )

    @torch.no_grad()
    def fold_block(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> None:
        found = self._found(block, inputs, index)
        pairs = [
            Pair("", sources[0], {"": reader}, {}, torch.arange(reader.in_features))
            for reader, sources in found.items()
        ]
        for (reader, sources), maxima in zip(found.items(), channel_maxima(pairs, block, inputs, index)):
            _permute(_between(sources, reader), maxima.argsort(descending=True, stable=True))

    @torch.no_grad()
    def _found(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> dict[nn.Linear, list[nn.Linear]]:
        """Linears, and those before them whose outputs may come in any order."""
        of_block, run = linears(block), partial(inputs[0].run, index, block)
        groups = [[of_block[name] for name in names] for names, calls in shared_inputs(of_block, run) if calls]
        found = {}
        for i, group in enumerate(groups):
            for reader in (linear for later in groups[i + 1 :] for linear in later):
                sources = [linear for linear in group if linear.out_features == reader.in_features]
                if sources and reader not in found and _permutable(sources, reader, run):
                    found[reader] = sources
        # those of one process: an expert that is called there may not be called in another's first batch
        name_of = {linear: name for name, linear in of_block.items()}
        names = {name_of[reader]: [name_of[source] for source in sources] for reader, sources in found.items()}
        device = next(block.parameters()).device
        return {of_block[r]: [of_block[s] for s in sources] for r, sources in of_first_process(names, device).items()}


def _residual_stream(model: Any, ids: Tensor) -> tuple[list[Side], list[nn.Module]]:
    """What holds a channel of the stream for each number of a dimension; and the norms that linears in blocks read."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    hidden_size = embedding.weight.shape[1]
    _, blocks = find_blocks(model)
    (inputs,) = block_inputs(model, blocks, [{"input_ids": ids}])
    sides: dict[int, Side] = {id(module.weight): (module.weight, 1) for module in (embedding, head)}
    sources: list[nn.Module] = []

    def add(parameter: Tensor | None, dim: int) -> None:
        if parameter is not None:
            sides[id(parameter)] = parameter, dim

    def add_norms(module: nn.Module) -> dict[str, nn.Module]:
        of_stream = {key: norm for key, norm in norms(module).items() if len(norm.weight) == hidden_size}  # pyright: ignore[reportArgumentType]
        for norm in of_stream.values():
            for parameter in norm.parameters():
                add(parameter, 0)
        return of_stream

    add_norms(model)
    for index, block in enumerate(blocks):
        pairs = find_pairs(block, partial(inputs.run, index, block), add_norms(block))
        readers = [reader for pair in pairs for reader in pair.readers.values()]
        sources += [pair.source for pair in pairs]
        for parameter in (
            *(reader.weight for reader in readers),
            *(other for pair in pairs for other in pair.others.values()),
        ):
            add(parameter, parameter.ndim - 1)
        for linear in linears(block).values():
            if linear.out_features == hidden_size and not any(linear is reader for reader in readers):
                add(linear.weight, 0)
                add(linear.bias, 0)
    return list(sides.values()), sources


def _by_outliers(model: Any, sources: Sequence[nn.Module], data: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The stream's channels, those first that stick out most behind one of the norms `sources`."""
    maxima: dict[nn.Module, Tensor] = {}

    def watch(mask: Tensor | None) -> Callable[..., None]:
        def take(norm: nn.Module, arguments: Any, output: Tensor) -> None:
            largest = token_rows(output, mask).abs().amax(0).float()
            maxima[norm] = largest.maximum(maxima.get(norm, largest))

        return take

    for batch in data:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        handles = [norm.register_forward_hook(watch(mask)) for norm in sources]
        try:
            model.base_model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    found = over_processes(torch.stack([maxima[norm] for norm in sources]), "MAX")
    # in a norm whose channels are mostly zero any other one sticks out
    smallest = torch.finfo(found.dtype).tiny
    relative = found / found.median(-1, keepdim=True).values.clamp(min=smallest)
    return relative.amax(0).argsort(descending=True, stable=True)


def _between(sources: Sequence[nn.Linear], reader: nn.Linear) -> Iterator[Side]:
    yield reader.weight, 1
    for source in sources:
        yield source.weight, 0
        if source.bias is not None:
            yield source.bias, 0


def _permutable(sources: Sequence[nn.Linear], reader: nn.Linear, run: Callable[[], Tensor]) -> bool:
    def outputs() -> list[Tensor]:
        """Of the reader and of the block, in which the reader's part may be small."""
        seen: list[Tensor] = []

        def see(module: nn.Module, arguments: Any, output: Tensor) -> None:
            seen.append(output)

        handle = reader.register_forward_hook(see)
        try:
            return [run(), *seen]
        finally:
            handle.remove()

    expected = outputs()
    order = torch.randperm(reader.in_features, generator=torch.Generator().manual_seed(0)).to(reader.weight.device)
    sides = list(_between(sources, reader))
    _permute(sides, order)
    try:
        found = outputs()
    finally:
        _permute(sides, order.argsort())
    return len(found) == len(expected) and all(close(one, other) for one, other in zip(found, expected))


def _permute(sides: Sequence[Side] | Iterator[Side], order: Tensor) -> None:
    for parameter, dim in sides:
        parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))
