"""Fashion-MNIST, from the IDX files of a Debian package."""

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tersor.integration.errors import UserError
from tersor.integration.zoo.data.images import labelled

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist"
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def fashion_mnist(split: str = "train") -> "Dataset":
    """Fashion-MNIST (arXiv:1708.07747): `image`, 28 x 28 grey, and `label`, ten kinds of clothing. Licence: MIT.

    55,000 images for training, 5,000 for validation (one in twelve of each class of the published training set) and
    the published 10,000 for testing.

    Raises:
        UserError: the Debian package `dataset-fashion-mnist` is missing or damaged.
    """
    if split == "test":
        return labelled("fashion-mnist", split, CLASSES, {"test": 1}, lambda: _arrays("t10k"))
    return labelled("fashion-mnist", split, CLASSES, {"train": 11, "validation": 1}, lambda: _arrays("train"))


def _arrays(part: str) -> tuple[np.ndarray, list[int]]:
    images, labels = (read_idx(FOLDER / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if images.shape != (labels.size, 28, 28) or labels.max(initial=0) >= len(CLASSES):
        raise UserError(
            f"{FOLDER} is damaged (images {images.shape}, {labels.size} labels up to {labels.max(initial=0)}): "
            f"{INSTALL} --reinstall"
        )
    return images, labels.ravel().tolist()


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped IDX file: 0, 0, 8 (unsigned bytes), the number of dimensions, each one's size as
    a big-endian 32-bit integer, and the bytes.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {INSTALL}")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {INSTALL} --reinstall") from error
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:3] != b"\0\0\x08" or not dimensions or len(content) != start + math.prod(shape):
        raise UserError(f"{path} is damaged (not an IDX file of bytes, or not whole): {INSTALL} --reinstall")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
