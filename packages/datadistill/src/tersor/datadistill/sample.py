"""Epochs that leave examples out: a batch sampler that learns from the losses it is told."""

import warnings
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler

from tersor.datadistill.recipe import Kept, Recipe


def sample(
    dataset: Dataset,
    recipe: Recipe,
    *,
    epochs: int,
    batch_size: int,
    sampler: Sampler[int] | None = None,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> "PrunedBatches":
    """Batches of `dataset` for `epochs` epochs, without the examples that `recipe` leaves out.

    Give it to a DataLoader as its batch sampler, over `.dataset`, whose items come with their index; hand each batch's
    losses to `.weigh`, one for each example, and go on with the loss that it returns.

    Args:
        epochs: the whole training; the recipe needs to know its end.
        sampler: your own order of the examples, filtered each epoch; None shuffles.
        generator: source of the shuffling and of the lot, on the CPU; None is seed 0.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from tersor.datadistill import recipes, sample
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(256, 4, generator=generator)
    >>> y = (x.sum(1) > 0).long()
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> batches = sample(TensorDataset(x, y), recipes.infobatch(), epochs=8, batch_size=32)
    >>> for epoch in range(8):
    ...     for index, (x_, y_) in DataLoader(batches.dataset, batch_sampler=batches):
    ...         losses = torch.nn.functional.cross_entropy(model(x_), y_, reduction="none")
    ...         loss = batches.weigh(index, losses)
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    >>> batches.stats.epochs[0], batches.stats.epochs[-1]  # nothing is known yet; annealing
    (Epoch(kept=256, total=256), Epoch(kept=256, total=256))
    >>> batches.stats.ratio < 0.85
    True
    """
    return PrunedBatches(dataset, recipe, epochs, batch_size, sampler, drop_last, generator)


class Indexed(Dataset):
    """Item i of a data set as (i, item): so losses find back to their examples, from any worker process."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[int, object]:
        return i, self.dataset[i]


class Epoch(NamedTuple):
    kept: int
    total: int


@dataclass
class SampleStats:
    """Counts of the examples that were handed out; the incomplete batches that `drop_last` drops are counted too.

    Args:
        epochs: each epoch that has begun.
        nan_losses: losses that were NaN or infinite; their examples kept the old score.
    """

    epochs: list[Epoch] = field(default_factory=list)
    nan_losses: int = 0

    @property
    def ratio(self) -> float:
        """Examples handed out, as a share of what plain training would have: the cost that is left."""
        total = sum(epoch.total for epoch in self.epochs)
        return sum(epoch.kept for epoch in self.epochs) / total if total else 1.0

    def __str__(self) -> str:
        kept, total = (sum(counts) for counts in zip(*self.epochs)) if self.epochs else (0, 0)
        return f"{kept} of {total} examples ({self.ratio:.1%}) in {len(self.epochs)} epochs"


class PrunedBatches(Sampler[list[int]]):
    """What `sample` returns: a batch sampler with a memory of losses. Each iteration is the next epoch.

    Attributes:
        dataset: the data set with indices, for the DataLoader.
        stats: counts, see `SampleStats`.
        scores: (examples,), float32: what is known of each example's loss, NaN before its first.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        epochs: int,
        batch_size: int,
        sampler: Sampler[int] | None,
        drop_last: bool,
        generator: torch.Generator | None,
    ) -> None:
        if recipe.sampling is None:
            raise ValueError(f"{recipe} has no sampling; a recipe for a smaller set goes to `distill`")
        if not isinstance(dataset, Sized) or not len(dataset):
            raise TypeError(f"{type(dataset).__name__} has no items by index; streams and empty sets cannot be sampled")
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise NotImplementedError("losses are not gathered over processes; run sample in one process")
        self.epochs, self.batch_size, self.drop_last = epochs, batch_size, drop_last
        self.dataset = Indexed(dataset)
        self.stats = SampleStats()
        self.scores = torch.full((len(dataset),), torch.nan)
        self._sampling = recipe.sampling
        self._generator = generator or torch.Generator().manual_seed(0)
        self._order = RandomSampler(dataset, generator=self._generator) if sampler is None else sampler
        self._kept = Kept(torch.ones(len(dataset), dtype=torch.bool), torch.ones(len(dataset)))
        self._weighed = 0

    def __len__(self) -> int:
        """Batches of the epoch that has begun last; before the first one, those of all examples."""
        kept = self.stats.epochs[-1].kept if self.stats.epochs else len(self.dataset)
        return kept // self.batch_size if self.drop_last else -(-kept // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # a generator: the epoch begins with its first batch, because a loader with workers makes two iterators for one
        epoch = len(self.stats.epochs)
        if epoch >= self.epochs:  # beyond: a state of a longer training was loaded
            raise RuntimeError(f"all {self.epochs} epochs are done; pass the length of the whole training as epochs")
        if epoch and len(self) and not self._weighed:
            raise RuntimeError("no loss of the last epoch was recorded: call weigh(index, losses) for each batch")
        self._weighed = 0
        self._kept = self._sampling.select(self.scores, epoch, self.epochs, self._generator)
        order = list(self._order)
        indices = [i for i in order if self._kept.keep[i]]
        self.stats.epochs.append(Epoch(len(indices), len(order)))
        if epoch == self.epochs - 1 and self.stats.ratio == 1:
            warnings.warn(f"{self._sampling} left out nothing in {self.epochs} epochs", stacklevel=2)
        yield from BatchSampler(indices, self.batch_size, self.drop_last)

    def weigh(self, index: Tensor, losses: Tensor) -> Tensor:
        """Mean of w_i l_i over the batch, and the losses are remembered.

        Args:
            index: (batch,), as the loader gave it.
            losses: (batch,), one for each example, of `reduction="none"`.
        """
        if losses.shape != index.shape or losses.ndim != 1:
            raise ValueError(
                f"losses has shape {tuple(losses.shape)}, index {tuple(index.shape)}; "
                'give one loss per example: reduction="none", then the mean over all other dimensions'
            )
        index = index.cpu()
        known = losses.detach().float().cpu()
        finite = known.isfinite()
        self.stats.nan_losses += int((~finite).sum())
        there = index[finite]
        self.scores[there] = self._sampling.update(self.scores[there], known[finite])
        self._weighed += len(index)
        return (losses * self._kept.weight[index].to(losses)).mean()

    def state_dict(self) -> dict[str, Tensor | int]:
        """All that the next epoch depends on; plain values and tensors. To be taken between epochs."""
        begun = self.stats.epochs[-1].kept if self.stats.epochs else 0
        if begun - self._weighed >= (self.batch_size if self.drop_last else 1):
            raise RuntimeError(
                f"epoch {len(self.stats.epochs) - 1} has {begun} examples, {self._weighed} losses are recorded; "
                "take state_dict after the epoch"
            )
        return {
            "scores": self.scores.clone(),
            "generator": self._generator.get_state(),
            "epochs": torch.tensor(self.stats.epochs, dtype=torch.long).reshape(-1, 2),
            "weighed": self._weighed,
            "nan_losses": self.stats.nan_losses,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. A sampler of your own is yours to restore."""
        if state["scores"].shape != self.scores.shape:
            raise ValueError(f"state is of {len(state['scores'])} examples, the data set has {len(self.scores)}")
        self.scores = state["scores"].clone()
        self._generator.set_state(state["generator"])
        epochs = [Epoch(*counts) for counts in state["epochs"].tolist()]
        self.stats = SampleStats(epochs, state["nan_losses"])
        self._weighed = state["weighed"]
