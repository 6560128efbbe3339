"""Several processes, each with a part of the calibration data, where `torch.distributed` runs; else there is one."""

from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_processes(values: Tensor, operation: str = "SUM") -> Tensor:
    """`values` in place, summed (or "MAX") over what all processes hold: all of them then hold the same."""
    if num_processes() > 1:
        distributed.all_reduce(values, getattr(distributed.ReduceOp, operation))
    return values


def most_over_processes(value: int, device: torch.device) -> int:
    """The largest that any process holds; `device` is this one's."""
    return int(over_processes(torch.tensor([value], device=device), "MAX"))


def of_first_process(value: T, device: torch.device) -> T:
    """What the first process holds, in all of them; `device` is this one's, as backends for GPUs want to know."""
    held = [value]
    if num_processes() > 1:
        distributed.broadcast_object_list(held, device=device)
    return held[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what all processes hold."""
    return over_processes(values) / num_processes()
