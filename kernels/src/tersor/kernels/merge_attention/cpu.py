"""The merge on the CPU: one pass over the parts instead of eight."""

import math

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.cpu import REORDER, array, jit
from tersor.kernels.dispatch import Declined

_f32, _index = np.float32, np.uint64


def merge_attention(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | Declined:
    if torch.float64 in (outputs.dtype, lse.dtype):
        return Declined("float64")
    parts, head_dim = outputs.shape[0], outputs.shape[-1]
    rows = lse.shape[1:].numel()
    output = outputs.new_zeros(outputs.shape[1:], dtype=torch.float32)
    total = lse.new_full(lse.shape[1:], -torch.inf, dtype=torch.float32)
    if parts and rows:
        _merge(
            array(outputs.float().reshape(parts, rows, head_dim).contiguous()),
            array(lse.float().reshape(parts, rows).contiguous()),
            array(output.view(rows, head_dim)),
            array(total.view(rows)),
        )
    return output.to(outputs.dtype), total


@jit(fastmath=REORDER)
def _merge(outputs, lse, output, total):
    parts, rows, head_dim = outputs.shape
    for row in range(_index(rows)):
        largest = -_f32(np.inf)
        for i in range(_index(parts)):
            if lse[i, row] > largest or np.isnan(lse[i, row]):
                largest = lse[i, row]
        if largest == -np.inf:
            continue
        weights = _f32(0)
        for i in range(_index(parts)):
            if lse[i, row] != -np.inf:
                weight = _f32(math.exp(lse[i, row] - largest))
                weights += weight
                for j in range(_index(head_dim)):
                    output[row, j] += weight * outputs[i, row, j]
        for j in range(_index(head_dim)):
            output[row, j] /= weights
        total[row] = largest + _f32(math.log(weights))
