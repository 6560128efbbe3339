"""What every solver returns, and how good it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from tersor.quant.grid.protocol import Params


class Result(NamedTuple):
    codes: Tensor  # as the grid's `encode` returns them: uint8 (out, in) of a scalar grid
    params: Params


class Split(NamedTuple):
    """What a solver returns that leaves part of the weight to the recipe's compensation."""

    codes: Tensor
    params: Params
    rest: Tensor  # (out, in): to be added to the decoded weight; what is not zero matters


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - decoded: the relative squared error of the layer's outputs.

    Without a hessian, that of the weights. 0 where the outputs are zero either way.
    """
    difference, weight = weight.float() - decoded, weight.float()
    moved, whole = (difference, weight) if hessian is None else (difference @ hessian.float(), weight @ hessian.float())
    error, norm = ((a * b).sum(dtype=torch.float64) for a, b in ((moved, difference), (whole, weight)))
    return float(error / norm) if norm else 0.0
