"""AWQ: scales of channels, searched for what the module around them puts out."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from posixpath import commonpath
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tersor.quant.calibration import BlockInputs, Pass, SecondMoments, block_passes, token_rows
from tersor.quant.grid import ScalarGrid
from tersor.quant.grid.protocol import Grid
from tersor.quant.processes import over_processes
from tersor.quant.transform.fold import Pair, check_scalable, fold_scale, observe, rounded, scalable


@dataclass(frozen=True)
class ActScale:
    """s = X_mean^r / W_mean^(1 - r), r = 0, 1/steps, ..., the best of them or s = 1 (arXiv:2306.00978, section 3.2).

    X_mean is the mean magnitude of an input channel, W_mean that of |w| / max|w of its group|. The best one makes the
    least squared difference in the output of the smallest module that all readers of the scaled output lie in
    (attention, MLP, or the one linear), with Q(W s) / s for their weights, Q rounding to nearest. So on the calibration
    data it is never worse than no scale. As in the authors' code (the paper has X_mean^r), apart from four things:
    s = 1 is tried too; in modules of more than one linear all are tried on an eighth of the data, and the best three of
    them and s = 1 on all of it; heads that share a value (GQA) share the mean of their channels, where theirs are left
    out; a channel that the data or the weights leave at zero keeps s = 1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        check_scalable(block, inputs, index)

    def fold_block(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> None:
        pairs = [pair for pair in scalable(block, inputs, index) if any(r in grids for r in pair.readers.values())]
        parents = [_parent(pair, block) for pair in pairs]
        means, seen = _observed(pairs, parents, block_passes(block, inputs, index))
        scales = []
        for pair, of_input, parent in zip(pairs, means, parents):
            candidates = self.candidates(of_input, pair.per_channel(_relative_magnitude(pair, grids), "mean"))
            scales.append(candidates[seen[parent].best(pair, candidates, grids)])
        # all are searched before one is folded: what is divided in one pair's rows does not change their rounding
        for pair, scale in zip(pairs, scales):
            fold_scale(pair, scale)

    def candidates(self, of_input: Tensor, of_weight: Tensor) -> list[Tensor]:
        """Scales (channels) to try, given X_mean and W_mean of the channels."""
        alive = (of_input > 0) & (of_weight > 0)
        found = [torch.ones_like(of_input)]
        for step in range(self.steps if alive.any() else 0):
            r = step / self.steps
            # 1e-4: the authors' bounds
            s = (of_input[alive] ** r / (of_weight[alive] ** (1 - r) + 1e-4)).clamp(min=1e-4)
            found.append(torch.ones_like(of_input).masked_scatter(alive, s / (s.max() * s.min()).sqrt()))
        return found


class _Inputs(Protocol):
    """What a module was given, and so what its outputs would be with other weights."""

    def note(self, arguments: tuple[Any, ...], keywords: dict[str, Any], mask: Tensor | None) -> None: ...

    def best(self, pair: Pair, candidates: Sequence[Tensor], grids: Mapping[nn.Linear, Grid]) -> int:
        """Which of `candidates` (channels of the pair each), the first of them s = 1, changes outputs the least."""
        ...


class _LinearInputs:
    """Of a linear, whose outputs' error is that of its weight, weighed by second moments."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.moments = linear, SecondMoments(linear.in_features, linear.weight.device)

    def note(self, arguments: tuple[Any, ...], keywords: dict[str, Any], mask: Tensor | None) -> None:
        self.moments.update(token_rows(arguments[0], mask))

    def best(self, pair: Pair, candidates: Sequence[Tensor], grids: Mapping[nn.Linear, Grid]) -> int:
        self.moments.merge()
        weight, H, losses = self.linear.weight.float(), self.moments.mean.float(), []
        for candidate in candidates:
            with _rounded_as_after(pair, candidate, grids):
                difference = self.linear.weight.float() - weight
            losses.append(((difference @ H) * difference).sum(dtype=torch.float64))
        return int(torch.stack(losses).argmin())


class _ModuleInputs:
    """Of any other module, which is called again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []

    def note(self, arguments: tuple[Any, ...], keywords: dict[str, Any], mask: Tensor | None) -> None:
        self.calls.append((arguments, keywords, mask))

    def best(self, pair: Pair, candidates: Sequence[Tensor], grids: Mapping[nn.Linear, Grid]) -> int:
        wanted = [self._rows(call) for call in self.calls]

        def loss(candidate: Tensor, part: slice) -> Tensor:
            found = torch.zeros((), dtype=torch.float64)
            with _rounded_as_after(pair, candidate, grids):
                for call, rows in zip(self.calls[part], wanted[part]):
                    found += (self._rows(call) - rows).double().square().sum().cpu()
            return found

        first = over_processes(torch.stack([loss(candidate, slice(None, None, 8)) for candidate in candidates]))
        finalists = sorted({0, *first.argsort()[:3].tolist()})
        last = over_processes(torch.stack([loss(candidates[i], slice(None)) for i in finalists]))
        return finalists[int(last.argmin())]

    def _rows(self, call: tuple[tuple[Any, ...], dict[str, Any], Tensor | None]) -> Tensor:
        """What the module puts out, (tokens, features)."""
        arguments, keywords, mask = call
        found = self.module(*arguments, **keywords)
        return token_rows(found if isinstance(found, Tensor) else found[0], mask)


def _parent(pair: Pair, block: nn.Module) -> nn.Module:
    """The smallest module that all readers lie in: a single linear itself, else the attention, the MLP, or the block."""
    shared = commonpath([name.replace(".", "/") for name in (*pair.readers, *pair.others)])
    return block.get_submodule(shared.replace("/", "."))


def _observed(
    pairs: Sequence[Pair], parents: Sequence[nn.Module], runs: Iterable[Pass]
) -> tuple[list[Tensor], dict[nn.Module, _Inputs]]:
    """X_mean of each pair's channels, float32, and what `parents` are given."""
    sums: dict[int, Tensor] = {}
    found: dict[nn.Module, _Inputs] = {
        parent: _LinearInputs(parent) if isinstance(parent, nn.Linear) else _ModuleInputs(parent) for parent in parents
    }

    def take(i: int, x: Tensor) -> None:
        # with a one for each token, so that processes can add up both
        seen = torch.cat([x.abs().sum(0, dtype=torch.float64), torch.full((1,), len(x)).to(x.device)])
        sums[i] = sums[i] + seen if i in sums else seen

    for run, mask in runs:
        handles = [
            parent.register_forward_pre_hook(
                lambda module, arguments, keywords, mask=mask: found[module].note(arguments, keywords, mask),
                with_kwargs=True,
            )
            for parent in found
        ]
        try:
            observe(pairs, [(run, mask)], take)
        finally:
            for handle in handles:
                handle.remove()
    totals = [over_processes(sums[i]) for i in range(len(pairs))]
    return [pair.per_channel((s[:-1] / s[-1]).float(), "mean") for pair, s in zip(pairs, totals)], found


def _rounded_as_after(pair: Pair, scale: Tensor, grids: Mapping[nn.Linear, Grid]) -> AbstractContextManager[None]:
    """Inside, the pair's readers have the weights that folding `scale` and rounding would give them, over the scale."""
    return rounded(dict.fromkeys(pair.readers.values(), scale[pair.channel_of.to(scale.device)]), grids)


def _relative_magnitude(pair: Pair, grids: Mapping[nn.Linear, Grid]) -> Tensor:
    """Mean of |w| / max|w of its group| over the rows of all readers, (in,); a row is one group where nothing is rounded."""

    def relative(reader: nn.Linear) -> Tensor:
        weight, grid = reader.weight.abs().float(), grids.get(reader)
        grouped = weight.unflatten(1, (grid.groups(weight.shape[1]) if isinstance(grid, ScalarGrid) else 1, -1))
        # a group of zeros is 0 / 1
        largest = grouped.amax(-1, keepdim=True)
        return (grouped / torch.where(largest > 0, largest, 1.0)).flatten(1)

    return torch.cat([relative(reader) for reader in pair.readers.values()]).mean(0)
