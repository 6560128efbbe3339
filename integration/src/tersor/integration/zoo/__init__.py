"""Small trained models that ship with tersor, and texts to measure with. Loading needs no package but transformers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tersor.integration.errors import UserError, near_match

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the models."""
    return sorted(folder.name.replace("_", "-") for folder in _HERE.iterdir() if (folder / "config.json").is_file())


def path(name: str) -> Path:
    """The directory of model `name`, for `from_pretrained`.

    Raises:
        UserError: no such model, or its files are not what was shipped.
    """
    if name not in names():
        raise UserError(f"no model {name!r} in the zoo{near_match(name, names())}")
    folder = _HERE / name.replace("-", "_")
    verify(folder)
    return folder


def load(name: str) -> tuple[Any, Any]:
    """Model `name` in float32, on the CPU and in evaluation mode, and its tokenizer or image processor.

    Raises:
        UserError: as `path`.
    """
    import torch
    import transformers

    folder = path(name)
    # LlamaForCausalLM is loaded by AutoModelForCausalLM, and so is every other class by what its name ends in
    task = json.loads((folder / "config.json").read_text())["architectures"][0].partition("For")[2]
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder, dtype=torch.float32).eval()
    has_pictures = (folder / "preprocessor_config.json").is_file()
    auto = transformers.AutoImageProcessor if has_pictures else transformers.AutoTokenizer
    return model, auto.from_pretrained(folder)


def verify(folder: Path) -> None:
    """Compare the files of `folder` with its SHA256SUMS.

    Raises:
        UserError: a file is missing or has changed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, file = line.split()
        content = (folder / file).read_bytes() if (folder / file).is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            raise UserError(f"{folder / file} is damaged or missing; reinstall tersor")
