"""A low-rank matrix that takes back what rounding did to the outputs."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from tersor.kernels import add_low_rank
from tersor.quant.grid.protocol import Buffer, Stored, bits_of


@dataclass(frozen=True)
class LowRank:
    """C = up down, of `rank`, stored in float16: the least tr((E - C) H (E - C)^T) (EoRA, arXiv:2410.21271).

    The optimum is C = U U^T E, U the first eigenvectors of E H E^T. That is the paper's, an SVD of E H^(1/2) multiplied by
    H^(-1/2), without the inverse: nothing is damped, and fewer tokens than inputs will do.

    Args:
        rank: (out + in) * rank numbers of 16 bits are stored.
        metric: "outputs", or "weight": H = I, the plain SVD of the error, without data.
    """

    rank: int = 32
    metric: Literal["outputs", "weight"] = "outputs"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")
        if self.metric not in ("outputs", "weight"):
            raise ValueError(f'metric must be "outputs" or "weight", got {self.metric!r}')

    @property
    def needs_hessian(self) -> bool:
        return self.metric == "outputs"

    def check(self, out_features: int, in_features: int) -> None:
        if self.rank > min(out_features, in_features):
            raise ValueError(
                f"rank = {self.rank} is beyond that of a weight ({out_features}, {in_features}); "
                f"use at most {min(out_features, in_features)}"
            )

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        return {
            "up_bits": Buffer((out_features, self.rank), torch.int16),
            "down_bits": Buffer((self.rank, in_features), torch.int16),
        }

    def fit(self, error: Tensor, hessian: Tensor | None) -> tuple[Self, dict[str, Tensor]]:
        if hessian is None and self.needs_hessian:
            raise ValueError('LowRank needs calibration data; without, use metric="weight"')
        E, H = error.double(), hessian.double() if hessian is not None and self.needs_hessian else None
        if len(E) <= E.shape[1]:
            U = torch.linalg.eigh((E if H is None else E @ H) @ E.T).eigenvectors[:, -self.rank :]
        else:
            # the smaller matrix has the same eigenvalues: with S S^T = H, those of (E S)^T (E S)
            ES = E if H is None else E @ _root(H)
            U = torch.linalg.qr(ES @ torch.linalg.eigh(ES.T @ ES).eigenvectors[:, -self.rank :]).Q
        down = U.T @ E
        # float16 has few small numbers: both factors get the square root of their product's size
        size = down.norm(dim=1).sqrt()
        up, down = U * size, down / size.where(size > 0, 1.0)[:, None]
        return self, {"up_bits": bits_of(up.half()), "down_bits": bits_of(down.half())}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Tensor:
        up, down = _factors(stored, torch.float32)
        return up @ down

    def add(self, y: Tensor, h: Tensor, stored: Stored) -> Tensor:
        up, down = _factors(stored, y.dtype)
        return add_low_rank(y, h, down.T, up.T)


def _factors(stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(stored[name].view(torch.float16).to(dtype) for name in ("up_bits", "down_bits"))  # pyright: ignore[reportReturnType]


def _root(H: Tensor) -> Tensor:
    """S with S S^T = H."""
    values, vectors = torch.linalg.eigh(H)
    return vectors * values.clamp(min=0).sqrt()
