"""Trains the zoo's image classifiers on Fashion-MNIST: `tiny-vit` in half an hour, `tiny-cnn` in ten minutes, on one thread.

    tersor zoo train tiny-cnn

Writes RUN/model (what ships, with its card) and RUN/checkpoint.pt (the same command goes on after a stop).
Whatever is drawn depends on the seed and the step alone, so a run that was stopped ends with the same weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, ResNetConfig, ViTConfig, ViTImageProcessor

from tersor.integration.zoo.data import fashion_mnist
from tersor.integration.zoo.data.fashion import CLASSES
from tersor.integration.zoo.training import image_card
from tersor.integration.zoo.training.run import Progress, Run, cosine, device, optimizers, write_record, write_sums

MEAN, STD = 0.286, 0.353  # of the training pixels, from 0 for black to 1 for white
_DATA = {"num_channels": 1, "id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}


@dataclass(frozen=True)
class Training:
    """A classifier and how it is trained. The learning rates rise linearly, then fall to zero on a cosine.

    Args:
        purpose: what the model is for, a sentence for its card.
        architecture: the config in words.
        bar: test accuracy that the shipped weights must reach.
        learning_rate: AdamW's, at its highest.
        betas: AdamW's decays of the averages of gradients and of their squares.
        shift: pixels by which an image is moved at most, up or down and left or right.
        mirrored: share of the images that are mirrored.
        muon_rate: Muon's, at its highest, for the matrices inside the model; None leaves all to AdamW.
        warmup: share of the steps in which the rates rise.
    """

    name: str
    purpose: str
    architecture: str
    bar: float
    config: PreTrainedConfig
    epochs: int
    learning_rate: float
    batch_size: int
    shift: int
    mirrored: float
    betas: tuple[float, float] = (0.9, 0.999)
    muon_rate: float | None = None
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    warmup: float = 0.1


TINY_VIT = Training(
    "tiny-vit",
    "Made for token reduction and for the vision-language model, which need patches that have learnt something.",
    "`ViTForImageClassification`: 49 patches of 4 x 4 and a class token, 6 layers, width 128, 4 heads, feed-forward 256",
    bar=0.89,
    config=ViTConfig(
        image_size=28,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # after 100 steps of AdamW the loss was 1.12, with the usual 0.02 it was 1.36
        **_DATA,
    ),
    # too few epochs to learn images by heart, so they are moved little and not mirrored
    epochs=4,
    learning_rate=6e-4,
    betas=(0.9, 0.95),
    batch_size=64,
    shift=1,
    mirrored=0.0,
    muon_rate=3e-3,
)
TINY_CNN = Training(
    "tiny-cnn",
    "Its pooled output, 128 features, measures how near generated pictures are to real ones (FID).",
    "`ResNetForImageClassification`: 7 x 7 convolution, then three stages of two basic blocks, 32, 64 and 128 channels",
    bar=0.91,
    config=ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", **_DATA),
    epochs=10,
    learning_rate=4e-3,
    batch_size=128,
    shift=2,
    mirrored=0.5,
)
TRAININGS = {training.name: training for training in (TINY_VIT, TINY_CNN)}


class Images:
    """The training images of one run and its batches, each drawn from the seed and the step alone.

    Args:
        images: (n, 28, 28), uint8.
        labels: (n,), int64.
    """

    def __init__(self, training: Training, images: Tensor, labels: Tensor, seed: int) -> None:
        self.training, self.images, self.labels, self.seed = training, images, labels, seed
        self.steps_per_epoch = len(images) // training.batch_size
        self.steps = training.epochs * self.steps_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of `step`: each image once an epoch, but for the remainder of the last batch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        rows = torch.from_numpy(order[number * self.training.batch_size :][: self.training.batch_size])
        images = augment(self.images[rows], self.training.shift, self.training.mirrored, [self.seed, epoch, number])
        return images, self.labels[rows]


def start(training: Training, folder: Path, images: Tensor, labels: Tensor, seed: int) -> Run:
    """The run of `training` in `folder`, from the start or from its checkpoint."""
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model: Any = AutoModelForImageClassification.from_config(training.config)
    where = device()
    model = model.to(where, memory_format=torch.channels_last).train()
    source = Images(training, images, labels, seed)

    def loss(step: int) -> Tensor:
        pictures, wanted = source.batch(step)
        pixels = normalise(pictures).contiguous(memory_format=torch.channels_last).to(where)
        logits = model(pixels).logits
        return torch.nn.functional.cross_entropy(logits, wanted.to(where), label_smoothing=training.label_smoothing)

    return Run(
        folder,
        f"{training}, seed {seed}, {len(images)} images",
        model,
        optimizers(
            model,
            training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            muon_rate=training.muon_rate,
            outside=("classifier",),
        ),
        source.steps,
        loss,
        lambda done: cosine(done, training.warmup),
    )


def augment(images: Tensor, shift: int, mirrored: float, seed: list[int]) -> Tensor:
    """`images` (n, 28, 28) moved by up to `shift` pixels both ways, a share of them mirrored; what enters is black."""
    random, n, side = np.random.default_rng(seed), len(images), images.shape[-1]
    window = np.arange(side)
    rows = random.integers(2 * shift + 1, size=(n, 1)) + window
    columns = random.integers(2 * shift + 1, size=(n, 1)) + window
    columns = np.where(random.random((n, 1)) < mirrored, columns[:, ::-1], columns)
    padded = torch.nn.functional.pad(images, (shift,) * 4)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor) -> Tensor:
    """What the shipped processor makes of `images` (n, 28, 28): (n, 1, 28, 28), float32."""
    return (images[:, None] / 255 - MEAN) / STD


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` that `model` gives the right label; in evaluation mode."""
    predicted = torch.cat([model(normalise(batch)).logits.argmax(-1) for batch in images.split(250)])
    return (predicted == labels).float().mean().item()


def nearest_mean_accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """Accuracy of the class whose mean training image is nearest in pixels: what no learning at all gives."""
    means = torch.stack([images[labels == label].float().mean(0) for label in labels.unique()])
    nearest = torch.cdist(test_images.flatten(1).float(), means.flatten(1)).argmin(-1)
    return (nearest == test_labels).float().mean().item()


def read(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28), uint8, and labels (n,), int64, of Fashion-MNIST."""
    rows = fashion_mnist(split)
    images = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(images), torch.tensor(rows["label"])


def train(training: Training, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Train in `folder`, or go on there; returns the figures that the card in `folder`/model states.

    Args:
        progress: called with (done, total, what).
    """
    images, labels = read("train")
    run = start(training, folder, images, labels, seed)
    run.finish(progress)
    ship(run.model, folder / "model")
    test_images, test_labels = read("test")
    shipped = AutoModelForImageClassification.from_pretrained(folder / "model", dtype=torch.float32).eval()
    figures = {
        "accuracy": accuracy(shipped, test_images, test_labels),
        "nearest_mean": nearest_mean_accuracy(images, labels, test_images, test_labels),
        "images": len(images),
        "parameters": shipped.num_parameters(),
        "nbytes": (folder / "model/model.safetensors").stat().st_size,
        "seed": seed,
        **run.figures(),
    }
    write_record(folder / "model", run.figures(), seed)
    (folder / "model/README.md").write_text(image_card.card(training, figures))
    return figures


def ship(model: Any, folder: Path) -> None:
    """`model` in float16 with its processor and checksums. Half precision has three more bits here than bfloat16."""
    model = model.to(memory_format=torch.contiguous_format).half()
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        do_resize=False, size={"height": 28, "width": 28}, image_mean=[MEAN], image_std=[STD], do_convert_rgb=False
    )
    processor.save_pretrained(folder)
    write_sums(folder)
