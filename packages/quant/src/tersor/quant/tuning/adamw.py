"""The optimiser of all tunings."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tersor.quant.blocks import matches
from tersor.quant.processes import mean_over_processes


class RelativeAdamW:
    """AdamW (arXiv:1711.05101) whose rates count in each parameter's own size, as those of LAMB do (arXiv:1904.00962).

    So one rate serves scales of thousandths and norms of ones. A parameter's size is its root mean square at the start.
    Rates fall to zero in a straight line. Steps are taken in float32, whatever the dtype of the parameters, on gradients
    averaged over all processes where `torch.distributed` runs.

    Args:
        parameters: by name.
        rate: of those that `rates` does not name.
        rates: (pattern, rate): by the end of a parameter's name or of a module's that it lies in, as in `keep`.
        steps: that will be taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rate: float,
        steps: int,
        rates: tuple[tuple[str, float], ...] = (),
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = list(parameters.values())
        self._masters = [p.detach().clone().float() for p in self.parameters]
        sizes = [float(master.square().mean().sqrt()) or 1.0 for master in self._masters]
        own = [next((r for pattern, r in rates if matches(name, [pattern])), rate) for name in parameters]
        self._rates = [r * size for r, size in zip(own, sizes)]
        # a decay of the optimiser is multiplied by the rate
        groups = [{"params": [m], "weight_decay": weight_decay / s} for m, s in zip(self._masters, sizes)]
        self._optimizer = torch.optim.AdamW(groups, betas=betas) if groups else None
        self._steps, self._taken = steps, 0

    def step(self) -> None:
        """One step along the gradients of the parameters, which are then forgotten."""
        left = 1 - self._taken / self._steps
        self._taken += 1
        if self._optimizer is None:
            return
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * left
        for parameter, master in zip(self.parameters, self._masters):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            master.grad, parameter.grad = mean_over_processes(gradient.float()), None
        self._optimizer.step()
        for parameter, master in zip(self.parameters, self._masters):
            parameter.data.copy_(master)


def learnable(module: nn.Module, also: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters that have gradients, and those that `also` names (as in `keep`), which from now on do.

    A plain linear must be named itself: "bias" does not mean that of a linear that was to stay as it is.
    """
    plain = {name for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}

    def is_named(name: str) -> bool:
        owner = name.rpartition(".")[0]
        return matches(owner if owner in plain else name, also)

    found = {name: p for name, p in module.named_parameters() if p.requires_grad or is_named(name)}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


@contextmanager
def undone_unless_better(module: nn.Module, error: Callable[[], float]) -> Iterator[None]:
    """What happens to `module` inside stays only if it lowers `error`, which is called before and afterwards."""
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = error()
    yield
    after = error()
    if not after < before:
        module.load_state_dict(state)
