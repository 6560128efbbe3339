"""Checkpoints read and written a few tensors at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_INDEX = "model.safetensors.index.json"
_MANIFEST = "unfinished.json"
# of weights that are no codes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Source:
    """A directory of safetensors files, as `save_pretrained` writes it."""

    directory: Path

    def __post_init__(self) -> None:
        if not self.files:
            there = ", ".join(sorted(path.name for path in self.directory.glob("*"))[:5]) or "nothing"
            raise ValueError(
                f"{self.directory} holds no model.safetensors and no {_INDEX}, but {there}; load the model with "
                f"from_pretrained and write it with save_pretrained"
            )

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file that each tensor is in."""
        index, single = self.directory / _INDEX, self.directory / "model.safetensors"
        # where there are both, transformers reads the single file
        if single.is_file():
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
        if not index.is_file():
            return {}
        return {name: self.directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}

    def tensor(self, name: str) -> Tensor:
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors; nothing else is read but the files' headers."""
        of_files: dict[Path, list[str]] = {}
        for name in names:
            of_files.setdefault(self.files[name], []).append(name)
        found = {}
        for path, own in of_files.items():
            # opened for each call: pages of an open file that were once read stay in memory
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name).clone() for name in sorted(own)}
        return found

    def checksum(self, finite: Iterable[str]) -> str:
        """SHA-256 of config and tensors.

        Raises:
            ValueError: a tensor whose name is in `finite` holds NaN or infinity, or codes of another quantiser.
        """
        digest, finite = hashlib.sha256((self.directory / "config.json").read_bytes()), set(finite)
        for name in sorted(self.files):
            tensor = self.tensor(name)
            if name in finite and tensor.dtype not in _DTYPES:
                raise ValueError(f"{name} is {tensor.dtype}, as of a quantised checkpoint; start from the original")
            if name in finite and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; mend the checkpoint, or name the layer in keep")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Unfinished:
    """A directory beside the target that finished shards wait in, and a manifest of what they are for.

    Args:
        job: everything that the shards depend on, as plain values.

    Raises:
        ValueError: there is one already, of another job.
    """

    def __init__(self, target: Path, job: Mapping[str, Any]) -> None:
        self.target, self.directory = target, target.with_name(f".{target.name}.unfinished")
        self._manifest = self.directory / _MANIFEST
        self.shards: dict[str, Any] = {}
        if self._manifest.is_file():
            was = json.loads(self._manifest.read_text())
            if other := [key for key in job if was["job"].get(key) != job[key]]:
                raise ValueError(
                    f"{self.directory} holds unfinished work with another {' and '.join(other)}; finish that, or delete it"
                )
            self.shards = was["shards"]
        self._job = dict(job)
        self.directory.mkdir(exist_ok=True)
        self._note()

    def add(self, shard: str, tensors: dict[str, Tensor], about: Any) -> None:
        """Write a shard; `about` is what `shards` says of it once it is finished."""
        part = self.directory / f"{shard}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, self.directory / shard)
        self.shards[shard] = about
        self._note()

    def load(self, shard: str) -> dict[str, Tensor]:
        with safe_open(self.directory / shard, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not iterable

    def finish(self) -> None:
        """Add the index, and rename the directory to the target."""
        weight_map, size = {}, 0
        for shard in sorted(self.shards):
            with safe_open(self.directory / shard, "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), shard)
            size += (self.directory / shard).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if self.target.is_dir():
            self.target.rmdir()
        os.rename(self.directory, self.target)
        (self.target / _MANIFEST).unlink()

    def _note(self) -> None:
        part = self._manifest.with_suffix(".part")
        part.write_text(json.dumps({"job": self._job, "shards": self.shards}, indent=2) + "\n")
        os.replace(part, self._manifest)


def copy_tokenizer_and_processor(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer of a checkpoint, and to the processor of one that sees or hears."""
    for pattern in ("*token*.json", "*.model", "vocab.*", "merges.txt", "chat_template*", "*processor_config.json"):
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
