"""A few weights' errors, stored one by one."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tersor.quant.grid.protocol import Buffer, Stored, bits_of


@dataclass(frozen=True)
class SparseOutliers:
    """C with few elements that are not zero: for each a float16 and its column, 32 bits, row after row (arXiv:2306.03078).

    Args:
        ratio: of the elements of the error that are kept: those with the largest E_ij^2 H_jj, or E_ij^2 without data. None:
            all that are not zero, for solvers that leave outliers, and nothing else, to a compensation.
        count: how many elements a layer has; `fit` finds out.
    """

    ratio: float | None = None
    count: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1] or None, got {self.ratio}")

    @property
    def needs_hessian(self) -> bool:
        return False

    def check(self, out_features: int, in_features: int) -> None:
        if in_features >= 2**16:
            raise ValueError(f"in = {in_features}, but columns are stored in 16 bits; use another compensation")

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        return {
            "value_bits": Buffer((self.count,), torch.int16),
            "column_bits": Buffer((self.count,), torch.int16),
            "length_bits": Buffer((out_features,), torch.int16),
        }

    def fit(self, error: Tensor, hessian: Tensor | None) -> tuple[Self, dict[str, Tensor]]:
        kept = error != 0
        if self.ratio is not None:
            loss = error.square() if hessian is None else error.square() * hessian.diagonal().to(error.dtype)
            most = loss.flatten().topk(max(1, round(self.ratio * loss.numel()))).indices
            kept &= torch.zeros_like(kept).flatten().index_fill(0, most, True).view_as(kept)
        values = error[kept].half()
        if not values.isfinite().all():
            raise ValueError(
                f"outliers up to {float(error.abs().max()):.3g} are beyond float16; divide the weights by a constant"
            )
        stored = {
            "value_bits": bits_of(values),
            "column_bits": kept.nonzero()[:, 1].to(torch.uint16).view(torch.int16),
            "length_bits": kept.sum(1).to(torch.uint16).view(torch.int16),
        }
        return replace(self, count=int(kept.sum())), stored

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Tensor:
        return _matrix(stored, shape).to_dense()

    def add(self, y: Tensor, h: Tensor, stored: Stored) -> Tensor:
        C = _matrix(stored, (y.shape[-1], h.shape[-1]))
        added = (C @ h.reshape(-1, h.shape[-1]).T.float()).T
        return y + added.reshape(y.shape).to(y.dtype)


def _matrix(stored: Stored, shape: tuple[int, int]) -> Tensor:
    columns, lengths = (stored[name].view(torch.uint16).long() for name in ("column_bits", "length_bits"))
    rows = torch.arange(shape[0], device=lengths.device).repeat_interleave(lengths)
    values = stored["value_bits"].view(torch.float16).float()
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, shape, is_coalesced=True, check_invariants=False
    )
