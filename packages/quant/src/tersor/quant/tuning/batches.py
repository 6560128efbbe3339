"""The order in which tunings see the calibration data."""

from collections.abc import Iterator

import torch


def shuffled(count: int, steps: int, seed: int) -> list[int]:
    """`steps` numbers below `count`, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-steps // count))]
    return torch.cat(passes)[:steps].tolist()


def shuffled_rows(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of numbers below `count`."""
    batch_size = min(batch_size, count)
    order = shuffled(count, steps * batch_size, seed)
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
