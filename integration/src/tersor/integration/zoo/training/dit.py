"""Trains the zoo's diffusion transformers, each in about half an hour on one thread.

    tersor zoo train tiny-dit         # or tiny-dit-eps, tiny-dit-video

Writes RUN/model (what ships, with its card) and RUN/checkpoint.pt (the same command goes on after a stop).
Whatever is drawn depends on the seed and the step alone, so a run that was stopped ends with the same weights.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.integration.zoo.data import mnist
from tersor.integration.zoo.data.fashion import CLASSES as CLOTHES
from tersor.integration.zoo.data.handwriting import CLASSES as DIGITS
from tersor.integration.zoo.dit import NUM_TIMESTEPS, DiT, DiTConfig, alphas_cumprod
from tersor.integration.zoo.training import images
from tersor.integration.zoo.training.dit_card import card
from tersor.integration.zoo.training.run import Progress, Run, cosine, device, optimizers, write_record, write_sums

CANVAS, DIGIT_SIDE = 20, 10  # pixels of the videos of moving digits, and of the digits


@dataclass(frozen=True)
class Training:
    """A diffusion transformer and how it is trained: all that its weights depend on.

    Args:
        data: "clothes" (Fashion-MNIST) or "moving-digits" (MNIST).
        learning_rate: AdamW's, at its highest; the rates rise linearly, then fall to zero on a cosine.
        muon_rate: Muon's, for the matrices inside the model; None leaves all to AdamW.
        warmup: share of the steps in which the rates rise.
        average: decay of the moving average of the weights, which is what ships.
        dropped: share of the labels that become "no label", for guidance.
    """

    name: str
    data: str
    config: DiTConfig
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon_rate: float | None = 3e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    average: float = 0.999
    dropped: float = 0.1


_CLOTHES = {"id2label": dict(enumerate(CLOTHES)), "label2id": {name: label for label, name in enumerate(CLOTHES)}}
_DIGITS = {"id2label": dict(enumerate(DIGITS)), "label2id": {name: label for label, name in enumerate(DIGITS)}}
TINY_DIT = Training("tiny-dit", "clothes", DiTConfig(**_CLOTHES), steps=2400)
TINY_DIT_EPS = Training("tiny-dit-eps", "clothes", DiTConfig(prediction="epsilon", **_CLOTHES), steps=2800)
TINY_DIT_VIDEO = Training(
    "tiny-dit-video",
    "moving-digits",
    DiTConfig(image_size=CANVAS, num_frames=8, tubelet_size=2, **_DIGITS),
    steps=3600,
    batch_size=32,
)
TRAININGS = {training.name: training for training in (TINY_DIT, TINY_DIT_EPS, TINY_DIT_VIDEO)}


def start(training: Training, folder: Path, pictures: Tensor, labels: Tensor, seed: int) -> Run:
    """The run of `training` in `folder`, from the start or from its checkpoint.

    Args:
        pictures: what `read` gives: (n, side, side), uint8.
        labels: (n,), int64.
    """
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model = DiT(copy.deepcopy(training.config))
    where = device()
    model.to(where).train()  # pyright: ignore[reportArgumentType]

    def loss(step: int) -> Tensor:
        x, timestep, wanted, target, unit = (part.to(where) for part in batch(training, pictures, labels, [seed, step]))
        return ((model(x, timestep, wanted).float() - target) / unit).square().mean()

    return Run(
        folder,
        f"{training}, seed {seed}, {len(pictures)} images",
        model,
        optimizers(
            model,
            training.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=training.weight_decay,
            muon_rate=training.muon_rate,
            # the modulations are many, and for them Muon costs more than it brings
            outside=("embed", "position", "modulation", "head"),
        ),
        training.steps,
        loss,
        lambda done: cosine(done, training.warmup),
        average=training.average,
    )


def batch(
    training: Training, pictures: Tensor, labels: Tensor, seed: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the model sees and must say: x, timestep, labels, target, and the unit of its errors; drawn from `seed`.

    Timesteps of velocity models are the sigmoid of a normal number (arXiv:2403.03206, section 3.1); those of epsilon
    models are uniform. The unit of their errors is sqrt(a), which makes them the errors of v (arXiv:2202.00512): in
    plain epsilon, errors near timestep 999 hardly count, and there it is settled what a picture will show.
    """
    random = np.random.default_rng(seed)
    rows = random.integers(len(pictures), size=training.batch_size)
    is_kept = torch.from_numpy(random.random(len(rows)) >= training.dropped)
    wanted = labels[rows].where(is_kept, training.config.num_classes)
    data = make_data(training.data, pictures[rows], random)
    noise = torch.from_numpy(random.standard_normal(data.shape, np.float32))
    if training.config.prediction == "epsilon":
        timestep = torch.from_numpy(random.integers(NUM_TIMESTEPS, size=len(rows)))
        a = alphas_cumprod()[timestep].float()
        unit = _each(a.sqrt(), data)
        return unit * data + _each((1 - a).sqrt(), data) * noise, timestep, wanted, noise, unit
    timestep = torch.from_numpy(random.standard_normal(len(rows), np.float32)).sigmoid()
    x = data + _each(timestep, data) * (noise - data)
    return x, timestep, wanted, noise - data, torch.ones(())


def make_data(kind: str, pictures: Tensor, random: np.random.Generator) -> Tensor:
    """`pictures` (n, side, side), uint8, as they are learnt: (n, 1, side, side), or moving."""
    return scaled(pictures) if kind == "clothes" else moving(scaled(pictures), random)


def scaled(pictures: Tensor) -> Tensor:
    """(n, 1, side, side), from -1 for black to 1 for white, of `pictures` (n, side, side), uint8."""
    return pictures[:, None] / 127.5 - 1


def moving(digits: Tensor, random: np.random.Generator, frames: int = 8, canvas: int = CANVAS) -> Tensor:
    """Videos (n, 1, frames, canvas, canvas) of `digits` (n, 1, side, side), black being -1.

    Each starts anywhere and moves on by 1 to 2 pixels a frame in any direction, not only by whole pixels, and bounces
    off the edges as light does.
    """
    n, side = len(digits), digits.shape[-1]
    room = canvas - side
    angle, speed = random.uniform(0, 2 * np.pi, n), random.uniform(1, 2, n)
    velocity = np.stack([np.cos(angle), np.sin(angle)], -1) * speed[:, None]  # (n, 2): right, down
    path = random.uniform(0, room, (n, 1, 2)) + velocity[:, None] * np.arange(frames)[:, None]
    place = torch.from_numpy(np.abs((path + room) % (2 * room) - room)).float()  # (n, frames, 2): left edge, top
    # the canvas pixel p shows the digit at p - place; in grid_sample's units the digit is 2 wide, from -1 to 1
    window = torch.arange(canvas) + 0.5
    columns, rows = (2 * (window - place[..., axis, None]) / side - 1 for axis in (0, 1))  # (n, frames, canvas)
    grid = torch.stack([columns[:, :, None].expand(-1, -1, canvas, -1), rows[..., None].expand(-1, -1, -1, canvas)], -1)
    ink = (digits + 1).repeat_interleave(frames, 0)
    shown = F.grid_sample(ink, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    return shown.unflatten(0, (n, frames)).transpose(1, 2) - 1


def read(kind: str, split: str) -> tuple[Tensor, Tensor]:
    """Pictures (n, side, side), uint8, and labels (n,), int64: clothes of 28 pixels, or digits shrunk to 10."""
    if kind == "clothes":
        return images.read(split)
    rows = mnist(split)
    digits = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]]))
    shrunk = F.adaptive_avg_pool2d(digits[:, None].float(), DIGIT_SIDE)[:, 0]
    return shrunk.round().to(torch.uint8), torch.tensor(rows["label"])


def train(training: Training, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Train in `folder`, or go on there; returns what the training.json in `folder`/model states.

    Args:
        progress: called with (done, total, what).
    """
    from tersor.integration.zoo.measure import dit as measure  # which imports this file

    pictures, labels = read(training.data, "train")
    run = start(training, folder, pictures, labels, seed)
    run.finish(progress)
    model = ship(training, run, folder / "model")
    figures = run.figures()
    write_record(folder / "model", figures, seed)
    measured = measure.figures(training.name, model.to(device()), None)  # pyright: ignore[reportArgumentType]
    (folder / "model/README.md").write_text(card(training, figures | {"seed": seed}, measured, folder / "model"))
    return figures


def ship(training: Training, run: Run, folder: Path) -> DiT:
    """Writes the averaged weights in float16, with checksums; returns the model that is loaded from them, in float32."""
    model = DiT(copy.deepcopy(training.config))
    model.load_state_dict(run.averaged)
    model.half().save_pretrained(folder)
    write_sums(folder)
    return DiT.from_pretrained(folder, dtype=torch.float32).eval()


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
