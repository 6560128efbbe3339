"""Photographs that scikit-image brings."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.errors import UserError
from tersor.integration.zoo.data import splits
from tersor.integration.zoo.data.cache import cached, library

if TYPE_CHECKING:
    from datasets import Dataset

# those in the wheel whose docstrings in scikit-image state a licence
LICENCES = {
    "astronaut.png": "public domain",  # NASA
    "brick.png": "CC0-1.0",
    "camera.png": "CC0-1.0",
    "cell.png": "CC0-1.0",
    "chelsea.png": "CC0-1.0",
    "clock_motion.png": "public domain",
    "coffee.png": "CC0-1.0",
    "coins.png": "no known copyright restrictions",  # Brooklyn Museum
    "grass.png": "CC0-1.0",
    "gravel.png": "CC0-1.0",
    "hubble_deep_field.jpg": "public domain",  # NASA
    "ihc.png": "no known copyright restrictions",
    "retina.jpg": "CC0-1.0",
    "rocket.jpg": "public domain",  # SpaceX
}


def photographs(split: str = "train") -> "Dataset":
    """Photographs of scikit-image: `image`, grey or RGB, 300 to 1411 pixels wide, its `name` and its `licence`.

    Too few to be divided: `split` is "train".

    Raises:
        UserError: scikit-image is missing or damaged.
    """
    splits.check(split, ["train"])
    datasets = library()
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "name": text, "licence": text})
    return cached("photographs", features, _rows)


def _rows() -> Iterator[dict[str, Any]]:
    from PIL import Image

    # found, not imported: the image files are all that is needed of it
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError("photographs needs scikit-image: pip install 'tersor[data]'")
    for name, licence in LICENCES.items():
        path = Path(found.origin).parent / "data" / name
        try:
            content = path.read_bytes()
            Image.open(io.BytesIO(content)).load()
        except (OSError, SyntaxError) as error:  # Pillow calls a broken PNG a syntax error
            raise UserError(f"{path} is damaged ({error}): pip install --force-reinstall scikit-image") from error
        yield {"image": {"bytes": content, "path": None}, "name": path.stem, "licence": licence}
