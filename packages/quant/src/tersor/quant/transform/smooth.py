"""SmoothQuant: outliers of activations are moved into the weights, channel by channel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tersor.quant.blocks import linears
from tersor.quant.calibration import BlockInputs, block_passes, token_rows
from tersor.quant.grid.protocol import Grid
from tersor.quant.processes import over_processes
from tersor.quant.transform.fold import Pair, check_scalable, fold_scale, observe, rounded, scalable


@dataclass(frozen=True)
class Smooth:
    """s_j = max|X_j|^alpha / max_i|W_ij|^(1 - alpha): the input's channels are divided by s (arXiv:2211.10438, equation 4).

    Applied wherever the division folds into what comes before: unlike in the paper not only into norms, but also into
    the up projection for down, and the value projection for o (heads that share a value: the largest of theirs). A
    channel that the data or the weights leave at zero keeps s = 1.

    Args:
        alpha: how much of the difficulty moves to the weights, 0 to 1.
        percentile: over tokens, in place of max|X_j|: of 10 000 tokens, 99.99 keeps a single outlier from deciding.
    """

    alpha: float = 0.5
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {self.alpha}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {self.percentile}")

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        check_scalable(block, inputs, index)

    def fold_block(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> None:
        pairs = scalable(block, inputs, index)
        for pair, maxima in zip(pairs, channel_maxima(pairs, block, inputs, index, self.percentile)):
            fold_scale(pair, self.scale(pair, maxima))

    def scale(self, pair: Pair, maxima: Tensor) -> Tensor:
        """s (channels of the source), given the largest magnitudes `maxima` of the same."""
        of_weight = torch.stack([reader.weight.abs().amax(0).float() for reader in pair.readers.values()]).amax(0)
        of_weight = pair.per_channel(of_weight, "amax")
        s = maxima**self.alpha / of_weight ** (1 - self.alpha)
        # 1e-5: the authors' bound
        return torch.where((maxima > 0) & (of_weight > 0), s.clamp(min=1e-5), 1.0)


@dataclass(frozen=True)
class PercentileSmooth:
    """s_j = max(1, max|X_j| / t): only the largest channels are scaled, down to the threshold t (arXiv:2310.04836, DGQ).

    t is the `quantile` of the channels' largest magnitudes; the weights have no say.
    """

    quantile: float = 0.995

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        check_scalable(block, inputs, index)

    def fold_block(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> None:
        pairs = scalable(block, inputs, index)
        for pair, maxima in zip(pairs, channel_maxima(pairs, block, inputs, index)):
            fold_scale(pair, self.scale(maxima))

    def scale(self, maxima: Tensor) -> Tensor:
        """s (channels), given the largest magnitudes of the same."""
        above = int(len(maxima) * (1 - self.quantile))
        threshold = maxima.topk(above + 1).values[-1]
        return torch.where(threshold > 0, maxima / threshold, 1.0).clamp(min=1.0)


@dataclass(frozen=True)
class SearchedSmooth:
    """`Smooth` with one alpha for the whole model (arXiv:2312.03788, SmoothQuant+), or nothing where that is better.

    Tried are no smoothing at all (alpha = 0 also divides by the weights) and alpha = 0, `step`, ..., 1, each with weights
    rounded to nearest: the one with the least sum, over blocks, of squared differences between the outputs of the
    rounded blocks, each fed by the rounded ones before it, and those of the originals. The scales that are compared
    come from the original model's activations, those of the walk from the quantised one's.

    Holds the hidden states of the calibration data once per candidate, so give it a few thousand tokens. On the trained
    tiny-lm it takes 2 % off that sum at 4 bits per row, where `ActScale`, in about the same time, takes 9 % (the paper
    claims to beat it); in groups of 64 nothing is best.
    """

    step: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be above 0 and at most 1, got {self.step}")

    def candidates(self) -> list[Smooth]:
        # 1e-6: ten steps of .1 are a little less than 1
        return [Smooth(i * self.step) for i in range(math.ceil(1 / self.step - 1e-6))] + [Smooth(1.0)]

    def choose(
        self, blocks: Sequence[nn.Module], inputs: Sequence[BlockInputs], grids: Mapping[nn.Linear, Grid]
    ) -> tuple[Smooth, ...]:
        """The best `Smooth`, alone; or nothing."""
        candidates = [None, *self.candidates()]
        losses = torch.zeros(len(candidates), dtype=torch.float64)
        dense = [replace(each) for each in inputs]
        hidden = [[each.hidden for each in inputs] for _ in candidates]
        for index, block in enumerate(blocks):
            pairs = scalable(block, dense, index)
            maxima = channel_maxima(pairs, block, dense, index)
            wanted = [each.run(index, block) for each in dense]
            for i, candidate in enumerate(candidates):
                scales: dict[nn.Linear, Tensor | None] = dict.fromkeys(linears(block).values())
                for pair, largest in zip(pairs, maxima) if candidate else ():
                    of_input = candidate.scale(pair, largest)[pair.channel_of.to(largest.device)]
                    scales |= dict.fromkeys(pair.readers.values(), of_input)
                with rounded(scales, grids):
                    for b, each in enumerate(dense):
                        hidden[i][b] = replace(each, hidden=hidden[i][b]).run(index, block)
                        difference = token_rows(hidden[i][b] - wanted[b], each.mask).double()
                        losses[i] += difference.square().sum().cpu()
            for each, output in zip(dense, wanted):
                each.hidden = output
        best = candidates[int(over_processes(losses).argmin())]
        return () if best is None else (best,)


def channel_maxima(
    pairs: Sequence[Pair], block: nn.Module, inputs: Sequence[BlockInputs], index: int, percentile: float = 100.0
) -> list[Tensor]:
    """Largest magnitude, or that percentile over tokens, of each channel that the pairs' readers are given, float32."""
    tokens = sum(each.hidden[..., 0].numel() if each.mask is None else int(each.mask.sum()) for each in inputs)
    # 1e-6: 1000 * (100 - 99.9) / 100 is a little less than 1
    keep = int(tokens * (100 - percentile) / 100 + 1e-6) + 1
    largest: dict[int, Tensor] = {}

    def take(i: int, x: Tensor) -> None:
        seen = torch.cat([largest[i], x.abs().float()]) if i in largest else x.abs().float()
        largest[i] = seen.topk(min(keep, len(seen)), 0).values

    observe(pairs, block_passes(block, inputs, index), take)
    return [pair.per_channel(over_processes(largest[i][-1], "MAX"), "amax") for i, pair in enumerate(pairs)]
