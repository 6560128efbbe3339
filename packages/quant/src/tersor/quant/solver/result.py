"""What every solver returns, and how good it is."""

from typing import NamedTuple

from torch import Tensor

from tersor.quant.grid import IntParams


class Result(NamedTuple):
    codes: Tensor  # (out, in), uint8
    params: IntParams


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - decoded: the relative squared error of the layer's outputs.

    Without a hessian, that of the weights.
    """
    difference, weight = (weight - decoded).double(), weight.double()
    if hessian is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-300))
    H = hessian.double()
    return float((difference @ H * difference).sum() / (weight @ H * weight).sum().clamp(min=1e-300))
