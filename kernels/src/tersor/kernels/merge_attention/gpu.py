"""The merge on the GPU: a program takes some rows, and the parts one after the other."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined

_BLOCK = 1024


def merge_attention(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | Declined:
    if torch.float64 in (outputs.dtype, lse.dtype):
        return Declined("float64")
    parts, head_dim = outputs.shape[0], outputs.shape[-1]
    rows = lse.shape[1:].numel()
    output = outputs.new_empty(outputs.shape[1:])
    total = lse.new_empty(lse.shape[1:], dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(outputs):
            columns = triton.next_power_of_2(max(head_dim, 1))
            rows_at_once = max(1, _BLOCK // columns)
            _merge[(triton.cdiv(rows, rows_at_once),)](
                outputs.contiguous(),
                lse.contiguous(),
                output,
                total,
                parts,
                rows,
                head_dim,
                rows_at_once,
                columns,
            )
    return output, total


@triton.jit
def _merge(outputs, lse, output, total, parts, num_rows, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (j < head_dim)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    for i in range(parts):
        part = tl.load(lse + i * num_rows + row, mask=row < num_rows, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, part)
    # finite where no part saw a key: exp(-inf - 0) = 0
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    weights = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(parts):
        part = tl.load(lse + i * num_rows + row, mask=row < num_rows, other=-float("inf")).to(tl.float32)
        weight = tl.exp(part - largest)
        # the output of a part that saw no key is not read
        seen = inside & (part != -float("inf"))[:, None]
        x = tl.load(outputs + (i * num_rows + row)[:, None] * head_dim + j, mask=seen, other=0.0).to(tl.float32)
        weights += weight
        merged += weight[:, None] * x
    empty = weights == 0
    weights = tl.where(empty, 1.0, weights)
    tl.store(output + row[:, None] * head_dim + j, (merged / weights[:, None]).to(output.dtype.element_ty), mask=inside)
    tl.store(total + row, tl.where(empty, -float("inf"), largest + tl.log(weights)), mask=row < num_rows)
