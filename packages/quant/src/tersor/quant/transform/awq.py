"""AWQ: scales of channels, searched for what the module around them puts out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import commonpath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.quant.calibration import BlockInputs, Pass, block_passes, token_rows
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
    s = 1 is tried too; all are tried on an eighth of the data, and the best three of them and s = 1 on all of it;
    heads that share a value (GQA) share the mean of their channels, where theirs are left out; a channel that the data
    or the weights leave at zero keeps s = 1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        check_scalable(block, inputs, index)

    def fold_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grid: Grid) -> None:
        pairs = scalable(block, inputs, index)
        means = _means(pairs, block, inputs, index)
        scales = [self._search(pair, mean, block, inputs, index, grid) for pair, mean in zip(pairs, means)]
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

    def _search(
        self, pair: Pair, of_input: Tensor, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grid: Grid
    ) -> Tensor:
        candidates = self.candidates(of_input, pair.per_channel(_relative_magnitude(pair, grid), "mean"))
        # a single linear itself, else the attention, the MLP, or the block
        shared = commonpath([name.replace(".", "/") for name in (*pair.readers, *pair.others)])
        parent = block.get_submodule(shared.replace("/", "."))
        calls = _calls(parent, block_passes(block, inputs, index))
        wanted = [call.output(parent) for call in calls]

        def loss(candidate: Tensor, part: slice) -> Tensor:
            found = torch.zeros((), dtype=torch.float64)
            with rounded(dict.fromkeys(pair.readers.values(), candidate[pair.channel_of.to(candidate.device)]), grid):
                for call, output in zip(calls[part], wanted[part]):
                    difference = token_rows(call.output(parent) - output, call.mask)
                    found += difference.double().square().sum().cpu()
            return found

        some, all_of_them = slice(None, None, 8), slice(None)
        first = over_processes(torch.stack([loss(candidate, some) for candidate in candidates]))
        # s = 1 comes first, and stays if none is better
        finalists = sorted({0, *first.argsort()[:3].tolist()})
        last = over_processes(torch.stack([loss(candidates[i], all_of_them) for i in finalists]))
        return candidates[finalists[int(last.argmin())]]


class _Call(NamedTuple):
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask: Tensor | None

    def output(self, module: nn.Module) -> Tensor:
        found = module(*self.arguments, **self.keywords)
        return found if isinstance(found, Tensor) else found[0]


def _calls(module: nn.Module, runs: Iterable[Pass]) -> list[_Call]:
    """What `module` is called with in `runs`."""
    found: list[_Call] = []
    for run, mask in runs:
        handle = module.register_forward_pre_hook(
            lambda module, arguments, keywords, mask=mask: found.append(_Call(arguments, keywords, mask)),
            with_kwargs=True,
        )
        try:
            run()
        finally:
            handle.remove()
    return found


def _means(pairs: Sequence[Pair], block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> list[Tensor]:
    """X_mean of each pair's channels, float32."""
    sums: dict[int, Tensor] = {}

    def take(i: int, x: Tensor) -> None:
        # with a one for each token, so that processes can add up both
        seen = torch.cat([x.abs().sum(0, dtype=torch.float64), torch.full((1,), len(x)).to(x.device)])
        sums[i] = sums[i] + seen if i in sums else seen

    observe(pairs, block_passes(block, inputs, index), take)
    found = [over_processes(sums[i]) for i in range(len(pairs))]
    return [pair.per_channel((s[:-1] / s[-1]).float(), "mean") for pair, s in zip(pairs, found)]


def _relative_magnitude(pair: Pair, grid: Grid) -> Tensor:
    """Mean of |w| / max|w of its group| over the rows of all readers, (in,)."""
    weight = torch.cat([reader.weight.abs().float() for reader in pair.readers.values()])
    groups = grid.groups(weight.shape[1]) if isinstance(grid, ScalarGrid) else 1
    grouped = weight.unflatten(1, (groups, -1))
    # a group of zeros is 0 / 1
    largest = grouped.amax(-1, keepdim=True)
    return (grouped / torch.where(largest > 0, largest, 1.0)).flatten(1).mean(0)
