"""Losses that are errors of one layer, without running the model."""

from dataclasses import dataclass, replace

import torch

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.protocol import Table
from tersor.quant.solver import RTN, relative_error


@dataclass(frozen=True)
class RelativeError:
    """t^2 = ||W^ - W||^2 / ||W||^2, W^ rounded to nearest: needs no data. All layers count the same,
    whatever hangs on them: on tiny-lm, 3 bits on average so spent lose more than 3 bits for all (KL .127 against .078).

    It is the grid's error, whichever solver the recipe has: solvers that learn from data make it larger to make that of
    the outputs smaller.
    """

    def losses(self, candidates: Candidates) -> Table:
        return {
            name: [relative_error(linear.weight, weight, None) for weight in weights]
            for name, linear, weights, _ in candidates.compressed(
                replace(candidates.recipe, solver=RTN(), compensation=None)
            )
        }


@dataclass(frozen=True)
class OutputError:
    """tr(D H D^T), D = W^ - W as the recipe's solver leaves it: the mean squared error of the layer's outputs.

    Not relative: what comes of an error further up counts as much as the error is large beside the residual stream.
    """

    def losses(self, candidates: Candidates) -> Table:
        if not candidates.data:
            raise ValueError(
                "OutputError needs to know the inputs of layers: give calibration=token ids, or take RelativeError"
            )
        table: Table = {}
        for name, linear, weights, hessian in candidates.compressed(candidates.recipe, with_moments=True):
            differences = [weight - linear.weight.float() for weight in weights]
            H = torch.as_tensor(hessian, dtype=torch.float32)
            table[name] = [float((d @ H * d).sum(dtype=torch.float64)) for d in differences]
        return table
