"""How good generated pictures and videos are: do they show what was asked for, and are they like real ones?"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.integration import zoo
from tersor.integration.zoo.dit import DiT, ddim, euler
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.training import dit as training
from tersor.integration.zoo.training.dit import DIGIT_SIDE
from tersor.integration.zoo.training.images import normalise

STEPS, GUIDANCE = 50, 2.0
PICTURES_BAR, VIDEOS_BAR = 0.90, 0.80  # with guidance


class Videos(NamedTuple):
    """What videos of a moving digit are like."""

    accuracy: float  # share of the frames whose digit is the one that was asked for
    steady: float  # share of the videos in which it moves as in the training videos
    speed: float  # pixels per frame, the median


def figures(name: str, model: DiT, processor: None) -> list[Figure]:
    """Of 200 pictures or 40 videos, at 50 steps, with guidance and without; the bar is for those with."""
    if model.config.num_frames > 1:
        return _figures_of_videos(model)
    return _figures_of_pictures(model)


def _figures_of_pictures(model: DiT, samples_per_class: int = 20) -> list[Figure]:
    """The classifier is tiny-cnn. The baseline is the mean picture of a class, once for each sample."""
    classifier = zoo.load("tiny-cnn")[0]
    labels = every_class(model.num_classes, samples_per_class)
    real = training.scaled(training.read("clothes", "test")[0][: 2000 + len(labels)])
    reference, others = features(classifier, real).split([2000, len(labels)])
    means = class_means(*training.read("clothes", "validation"))[labels]
    mean_accuracy = accuracy(classifier, means, labels)
    mean_distance = frechet_distance(features(classifier, means), reference)
    best = frechet_distance(others, reference)
    found = []
    for guidance in (GUIDANCE, None):
        made = generate(model, labels, STEPS, guidance, seed=0)
        share, distance = accuracy(classifier, made, labels), frechet_distance(features(classifier, made), reference)
        how, bar = f"{len(labels)} pictures, {_words(guidance)}", PICTURES_BAR if guidance else None
        far = f"distance to real ones (FID), {how}; other real ones have {best:.1f}"
        found += [
            Figure(f"called by its class, {how}", share, mean_accuracy, "class means", bar=bar),
            Figure(far, distance, mean_distance, "class means", is_share=False),
        ]
    return found


def _figures_of_videos(model: DiT, samples_per_class: int = 4) -> list[Figure]:
    """The digit of a frame is that of its nearest training digit. The baseline is training videos played in disorder, of
    digits that have nothing to do with what was asked for."""
    labels = every_class(model.num_classes, samples_per_class)
    digits, digit_labels = training.read("moving-digits", "train")
    random = np.random.default_rng(0)
    rows = random.integers(len(digits), size=len(labels))
    disorder = training.make_data("moving-digits", digits[rows], random)[:, :, random.permutation(8)]
    baseline = videos(disorder, labels, digits, digit_labels)
    found = []
    for guidance in (GUIDANCE, None):
        made = videos(generate(model, labels, STEPS, guidance, seed=0), labels, digits, digit_labels)
        how = f"{len(labels)} videos, {_words(guidance)}"
        bar = VIDEOS_BAR if guidance else None
        found += [
            Figure(f"frames with the right digit, {how}", made.accuracy, baseline.accuracy, "other digits", bar=bar),
            Figure(f"videos with a steady motion, {how}", made.steady, baseline.steady, "frames in disorder", bar=bar),
        ]
    return found


@torch.inference_mode()
def generate(model: DiT, labels: Tensor, steps: int, guidance: float | None, seed: int, batch_size: int = 50) -> Tensor:
    """Pictures or videos in [-1, 1], one for each of `labels` (n,), by the sampler of the model's kind."""
    c = model.config
    shape = (c.num_channels, c.image_size, c.image_size)
    shape = shape if c.num_frames == 1 else (c.num_channels, c.num_frames, c.image_size, c.image_size)
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    sampler = euler if c.prediction == "velocity" else ddim
    parts = zip(noise.split(batch_size), labels.to(model.device).split(batch_size))
    return torch.cat([sampler(model, x, wanted, steps, guidance) for x, wanted in parts]).clamp(-1, 1).cpu()


def class_accuracy(
    model: DiT, classifier: nn.Module, samples_per_class: int, steps: int, guidance: float | None, seed: int
) -> float:
    """Share of generated pictures that `classifier` calls by the class that was asked for."""
    labels = every_class(model.num_classes, samples_per_class)
    return accuracy(classifier, generate(model, labels, steps, guidance, seed), labels)


def every_class(num_classes: int, samples_per_class: int) -> Tensor:
    """(num_classes * samples_per_class,): 0, 1, ..., 0, 1, ..."""
    return torch.arange(num_classes).repeat(samples_per_class)


@torch.inference_mode()
def accuracy(classifier: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Share of `pictures` (n, 1, side, side), in [-1, 1], that `classifier` calls by their `labels` (n,)."""
    called = torch.cat([classifier(part).logits.argmax(-1) for part in as_pixels(pictures).split(250)])
    return (called == labels).float().mean().item()


@torch.inference_mode()
def features(classifier: nn.Module, pictures: Tensor) -> Tensor:
    """(n, width), float64: what `classifier` pools of `pictures` (n, 1, side, side), in [-1, 1], before its last layer."""
    body: Any = classifier.get_submodule("resnet")
    return torch.cat([body(part).pooler_output.flatten(1) for part in as_pixels(pictures).split(250)]).double()


def frechet_distance(some: Tensor, others: Tensor) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of means and covariances of two sets of features, (count, width) float64.

    Source: arXiv:1706.08500, equation 6. It falls with the number of samples: compare sets of one size only.
    """
    a, b = some.T.cov(), others.T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric
    between = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((some.mean(0) - others.mean(0)).square().sum() + a.trace() + b.trace() - 2 * between).item()


def class_means(pictures: Tensor, labels: Tensor) -> Tensor:
    """(classes, 1, side, side), in [-1, 1]: the mean picture of each class of `pictures` (n, side, side), uint8."""
    return torch.stack([pictures[labels == label].float().mean(0) for label in labels.unique()])[:, None] / 127.5 - 1


def videos(generated: Tensor, labels: Tensor, digits: Tensor, digit_labels: Tensor) -> Videos:
    """Figures of `generated` (n, 1, frames, side, side), in [-1, 1].

    Args:
        digits: (m, side, side), uint8, with their labels (m,): a frame's digit is that of the nearest of them.
    """
    ink = F.relu((generated[:, 0] + 1) / 2 - 0.1)  # faint grey all over would draw the centre to the middle
    frames = ink.flatten(0, 1)
    known = F.relu(digits / 255 - 0.1)
    nearest = torch.cdist(centred(frames).flatten(1), centred(known).flatten(1)).argmin(-1)
    right = digit_labels[nearest].view(len(ink), -1) == labels[:, None]
    path = centres(frames).view(len(ink), -1, 2)
    step = path.diff(dim=1).abs()  # (n, frames - 1, 2)
    usual = step.median(1).values
    # each way it goes equally far at every step, but for those in which it bounces: two of the seven at most
    even = ((step - usual[:, None]).abs() < 0.5).sum(1) >= step.shape[1] - 2
    speed = usual.norm(dim=-1)
    steady = even.all(-1) & (speed > 0.75) & (speed < 2.25)  # in the training videos it is 1 to 2
    return Videos(right.float().mean().item(), steady.float().mean().item(), speed.median().item())


def centres(ink: Tensor) -> Tensor:
    """(n, 2): column and row of the centre of mass of `ink` (n, height, width), pixels from the middle of the first."""
    mass = ink.sum((1, 2)).clamp(min=1e-6)
    columns, rows = (torch.arange(size, dtype=ink.dtype) for size in (ink.shape[2], ink.shape[1]))
    return torch.stack([ink.sum(1) @ columns, ink.sum(2) @ rows], -1) / mass[:, None]


def centred(ink: Tensor) -> Tensor:
    """(n, side, side) of a digit: the square of `ink` (n, height, width) around its centre of mass, scaled to length 1."""
    height, width = ink.shape[1:]
    window = torch.arange(DIGIT_SIDE) - (DIGIT_SIDE - 1) / 2
    columns, rows = (
        2 * (centre[:, None] + window + 0.5) / size - 1
        for centre, size in zip(centres(ink).unbind(-1), (width, height))
    )
    grid = torch.stack([columns[:, None].expand(-1, DIGIT_SIDE, -1), rows[..., None].expand(-1, -1, DIGIT_SIDE)], -1)
    square = F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]
    return square / square.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None]


def as_pixels(pictures: Tensor) -> Tensor:
    """What the classifier's processor would make of them as 8-bit pictures."""
    return normalise(((pictures[:, 0] + 1) * 127.5).round())


def _words(guidance: float | None) -> str:
    return "no guidance" if guidance is None else f"guidance {guidance:g}"
