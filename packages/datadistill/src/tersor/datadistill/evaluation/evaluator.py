"""Accuracy of networks trained on a small set, over several seeds."""

import statistics
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from tersor.datadistill.evaluation.convnet import ConvNet
from tersor.datadistill.examples import Examples


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies as fractions, one of each seed.

    Args:
        seeds: what the networks and their batches were drawn from.
        each: accuracy of each seed's network at its last step.
        per_class: class number -> mean over seeds.
    """

    seeds: tuple[int, ...]
    each: tuple[float, ...]
    per_class: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds, 0 for one seed."""
        return statistics.stdev(self.each) if len(self.each) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {self.std:.1%} over {len(self.each)} seeds"


@dataclass(frozen=True)
class Evaluator:
    """Trains fresh networks on the small set and counts what they get right on a test set, after the last step.

    Nothing is chosen on the test set: no best step, no learning rate. Hard labels, no augmentation. SGD as in
    arXiv:2006.05929, section 4.1: momentum 0.9, weight decay 5e-4, a tenth of the learning rate from half-time on.

    Args:
        network: what is trained.
        seeds: one network each.
        steps: of SGD.
        batch_size: examples per step; a smaller set is one batch.
        lr: learning rate.
    """

    network: ConvNet = ConvNet()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    batch_size: int = 256
    lr: float = 0.01

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one, three for a deviation that means something")
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"steps, batch_size and lr must be positive, got {self.steps}, {self.batch_size} and {self.lr}"
            )

    def evaluate(self, train: Examples, test: Examples) -> Accuracy:
        """Accuracy on `test` of networks trained on `train`, on the device of `train`."""
        missing = sorted(set(test.classes) - set(train.classes))
        if missing:
            raise ValueError(f"classes {missing} of the test set are not in the training set")
        for name, images in (("training", train.images), ("test", test.images)):
            if not images.is_floating_point():
                raise TypeError(f"{name} images are {images.dtype}; scale them to floating point first")
        correct = []
        for seed in self.seeds:
            # torch's own initialisers know no generator; the caller's random state is put back
            devices = [train.images.device] if train.images.is_cuda else []
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(seed)
                network = self._train(train)
            with torch.no_grad():
                batches = test.images.to(train.images).split(1024)
                predicted = torch.cat([network(batch).argmax(-1) for batch in batches])
            correct.append((predicted == test.labels.to(predicted.device)).double().cpu())
        labels = test.labels.cpu()
        mean = torch.stack(correct).mean(0)
        return Accuracy(
            self.seeds,
            tuple(c.mean().item() for c in correct),
            {c: mean[labels == c].mean().item() for c in test.classes},
        )

    def _train(self, train: Examples) -> torch.nn.Module:
        images, labels = train
        network = self.network.build(tuple(images.shape[1:]), int(labels.max()) + 1).to(images)
        optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        order = torch.empty(0, dtype=torch.long)
        for step in range(self.steps):
            if step == (self.steps + 1) // 2:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr / 10
            if not len(order):
                order = torch.randperm(len(images))
            batch, order = order[: self.batch_size], order[self.batch_size :]
            loss = cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.eval()
