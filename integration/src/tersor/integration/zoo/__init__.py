"""Small trained models that ship with tersor, and texts to measure with.

This file, and those of models whose class is our own, import nothing of tersor: the tests of every package load them
from the repository, where torch, transformers and safetensors suffice.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# where classes live that transformers does not have
_OWN = {"DiT": ".dit", "MaskedDiffusionLlama": ".dlm"}


def names() -> list[str]:
    """Names of the models."""
    return sorted(folder.name.replace("_", "-") for folder in _HERE.iterdir() if (folder / "config.json").is_file())


def path(name: str) -> Path:
    """The directory of model `name`, for `from_pretrained`.

    Raises:
        ValueError: no such model.
        OSError: its files are not what was shipped.
    """
    if name not in names():
        raise ValueError(f"no model {name!r} in the zoo; there are: {', '.join(names())}")
    folder = _HERE / name.replace("-", "_")
    verify(folder)
    return folder


def load_model(name: str) -> Any:
    """Model `name` in float32, on the CPU and in evaluation mode. Needs torch, transformers and safetensors alone.

    Raises:
        ValueError, OSError: as `path`.
    """
    import torch
    import transformers

    folder = path(name)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    if architecture in _OWN:
        auto = getattr(importlib.import_module(_OWN[architecture], __name__), architecture)
    else:
        # LlamaForCausalLM is loaded by AutoModelForCausalLM, and so is nearly every class by what its name ends in
        task = architecture.partition("For")[2].replace("ConditionalGeneration", "ImageTextToText")
        auto = getattr(transformers, f"AutoModelFor{task}")
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def load(name: str) -> tuple[Any, Any]:
    """Model `name` as from `load_model`, and what reads its input, if anything does: a tokenizer, an image processor
    (which needs Pillow), or a processor of both.

    Raises:
        ValueError, OSError: as `path`.
    """
    import transformers

    model, folder = load_model(name), path(name)
    if (folder / "processor_config.json").is_file():
        return model, transformers.AutoProcessor.from_pretrained(folder)
    if (folder / "preprocessor_config.json").is_file():
        return model, transformers.AutoImageProcessor.from_pretrained(folder)
    if (folder / "tokenizer.json").is_file():
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    return model, None


def held_out_text() -> str:
    """English prose that no model here has seen in training."""
    return (_HERE / "held_out.txt").read_text()


def calibration_text() -> str:
    """Prose, documentation and code that the language models were trained on."""
    return (_HERE / "calibration.txt").read_text()


def verify(folder: Path) -> None:
    """Compare the files of `folder` with its SHA256SUMS.

    Raises:
        OSError: a file is missing or has changed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, file = line.split()
        content = (folder / file).read_bytes() if (folder / file).is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            raise OSError(f"{folder / file} is damaged or missing; reinstall tersor")
