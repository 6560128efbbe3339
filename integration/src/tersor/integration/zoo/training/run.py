"""One training: stopped and started again, it goes on and ends with the same weights."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tersor.integration import hardware
from tersor.integration.errors import UserError
from tersor.integration.zoo.training.muon import Muon

Progress = Callable[[int, int, str], None]  # done, total, what

_RECORD = "training.json"  # how a model was trained: of no matter to loading it


class Run:
    """A training in `folder`, from the start or from its checkpoint there.

    Args:
        settings: all that the weights depend on, the seed included.
        model: on the device where it is trained, in training mode.
        steps: how many there are.
        loss: the loss of a step, from the step's number; what it draws depends on that number alone.
        rate: the learning rates of a step as a share of the highest, from the share of the steps that are done.
        average: decay of a moving average of the weights, kept in `averaged`; None keeps none.

    Raises:
        UserError: the checkpoint there is another training's.
    """

    def __init__(
        self,
        folder: Path,
        settings: str,
        model: torch.nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        steps: int,
        loss: Callable[[int], Tensor],
        rate: Callable[[float], float],
        average: float | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.settings = folder / "checkpoint.pt", settings
        self.model, self.optimizers, self.steps = model, list(optimizers), steps
        self.loss, self.rate, self.average = loss, rate, average
        self.highest = [group["lr"] for group in self._groups()]
        self.averaged: dict[str, Tensor] = {}
        if average is not None:
            self.averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.step, self.spent = 0, 0.0
        if self.checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved["settings"] != self.settings:
            raise UserError(f"{self.checkpoint} is of a run with other settings or another seed; use another folder")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        for name, tensor in self.averaged.items():
            tensor.copy_(saved["averaged"][name])
        self.step, self.spent = saved["step"], saved["spent"]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def save(self) -> None:
        beside = self.checkpoint.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averaged": self.averaged,
            "settings": self.settings,
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, beside)
        beside.replace(self.checkpoint)

    def advance(self) -> float:
        """One step; returns its loss."""
        share = self.rate(self.step / self.steps)
        for group, highest in zip(self._groups(), self.highest):
            group["lr"] = highest * share
        on_gpu = next(self.model.parameters()).is_cuda
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = self.loss(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            decay = min(self.average, self.step / (self.step + 10))  # at first all weights are new
            for name, tensor in self.model.state_dict().items():
                self.averaged[name].lerp_(tensor, 1 - decay) if tensor.is_floating_point() else None
        return loss.item()

    def finish(self, progress: Progress, save_every: float = 60.0) -> None:
        """All the steps that are left; a checkpoint every `save_every` seconds and at the end."""
        before, started, last_save = self.spent, time.monotonic(), time.monotonic()
        while self.step < self.steps:
            loss = self.advance()
            self.spent = before + time.monotonic() - started
            if self.step % 20 == 0 or self.step == self.steps:
                progress(self.step, self.steps, f"loss {loss:.3f}, {self.spent / 60:.1f} minutes")
            if time.monotonic() - last_save > save_every:
                self.save()
                last_save = time.monotonic()
        self.save()

    def figures(self) -> dict[str, Any]:
        """What a card says of the run."""
        where = hardware.description()
        on_gpu = next(self.model.parameters()).is_cuda
        return {
            "steps": self.steps,
            "minutes": self.spent / 60,
            "hardware": where["accelerator"]
            if on_gpu
            else f"{where['processor']}, PyTorch threads: {torch.get_num_threads()}",
        }


def join(runs: Iterable[Run]) -> dict[str, Any]:
    """What a card says of `runs` that followed one another."""
    found = [run.figures() for run in runs]
    return {
        "steps": sum(figures["steps"] for figures in found),
        "minutes": sum(figures["minutes"] for figures in found),
        "hardware": found[-1]["hardware"],
    }


def device() -> torch.device:
    """Where trainings run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def optimizers(
    model: torch.nn.Module,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    muon_rate: float | None = None,
    outside: tuple[str, ...] = (),
) -> list[torch.optim.Optimizer]:
    """AdamW, without decay for vectors; and Muon for the matrices inside the model.

    Args:
        learning_rate: AdamW's, at its highest.
        muon_rate: Muon's, at its highest; None leaves all to AdamW.
        outside: parameters with one of these in their names are AdamW's: embeddings, the head.
    """
    named = list(model.named_parameters())
    inside = [p for n, p in named if muon_rate is not None and p.ndim == 2 and not any(word in n for word in outside)]
    mine = {id(p) for p in inside}
    others = [p for _, p in named if id(p) not in mine]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, learning_rate, betas)]
    if muon_rate is not None:
        found.append(Muon(inside, lr=muon_rate, weight_decay=weight_decay))
    return found


def cosine(done: float, warmup: float) -> float:
    """Rises linearly for the share `warmup`, then falls to zero on a cosine."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def trapezoid(done: float, warmup: float = 0.03, decay: float = 0.4) -> float:
    """Rises linearly for the share `warmup`, stays, and falls linearly to zero over the last share `decay`."""
    return min(1.0, (done + 1e-3) / (warmup + 1e-3), (1 - done) / decay)


def write_record(folder: Path, run: dict[str, Any], seed: int) -> None:
    """training.json, from which `tersor zoo list` tells how the model in `folder` was trained."""
    (folder / _RECORD).write_text(json.dumps({"seed": seed, **run}, indent=2) + "\n")


def num_parameters(folder: Path) -> int:
    """Of the weights in `folder`, tied ones once."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the files of `folder` that a model is loaded from."""
    sums = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors", ".jinja") and file.name != _RECORD
    ]
    (folder / "SHA256SUMS").write_text("".join(sums))
