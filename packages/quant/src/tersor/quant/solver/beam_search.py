"""Beam search over codes, in turns with least squares for codebooks."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tersor.quant.grid import AdditiveGrid, AdditiveParams, Grid
from tersor.quant.solver.result import Result

# errors of candidates that are held at a time: 64 MiB
_CANDIDATES = 2**24
# columns of a sweep that share a product with H: 640 x 2048 take an eighth of the time that one for each vector takes
_COLUMNS = 64


class _Block(NamedTuple):
    """Rows of codes kept in a sweep, some columns of them."""

    codes: Tensor  # (rows, beam, groups, codebooks)
    error: Tensor  # Q - W, (rows, beam, columns)
    slope: Tensor  # (Q - W) H with all columns, (rows, beam, columns)
    loss: Tensor  # less what it was at first, (rows, beam)


@dataclass(frozen=True)
class BeamSearch:
    """Lowers tr((W - Q) H (W - Q)^T) for sums of codebooks' vectors (AQLM, arXiv:2401.06118, algorithm 1).

    From the k-means of the weights, in turns: least squares for scales and codebooks, and for each row a sweep over its
    codes that keeps the `beam` best rows of codes so far, each vector chosen given all others. No turn raises the error;
    they end once one lowers it by less than `tolerance`. The last sweep takes codebooks and scales as they are stored. In
    place of least squares the authors have Adam, which gets as far (to 1%) in five times the time.

    Args:
        beam: rows of codes kept in a sweep.
        tolerance: relative.
        max_turns: ends them in any case.
        steps: of conjugate gradients on the codebooks, twice in a turn.
    """

    beam: int = 2
    tolerance: float = 0.01
    max_turns: int = 20
    steps: int = 3
    needs_hessian = True

    def __post_init__(self) -> None:
        for name in ("beam", "max_turns", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        if hessian is None:
            raise ValueError("BeamSearch needs calibration data")
        if not isinstance(grid, AdditiveGrid):
            raise TypeError(
                f"BeamSearch is for sums of codebooks, which {type(grid).__name__} is not: use an AdditiveGrid"
            )
        stored = grid.fit(weight)
        params = AdditiveParams(*(p.float() for p in stored))
        codes, H = grid.encode(weight, params), hessian.to(weight.dtype)
        before = math.inf
        for _ in range(self.max_turns):
            error = float(_errors(weight, grid.decode(codes, params), H).sum())
            if not error < (1 - self.tolerance) * before:
                break
            before = error
            params = self._refit(weight, grid, codes, params, H)
            codes = self.sweep(weight, grid, codes, params, H)
        rounded = AdditiveParams(*(new.to(old.dtype) for new, old in zip(params, stored)))
        return Result(self.sweep(weight, grid, codes, AdditiveParams(*(p.float() for p in rounded)), H), rounded)

    def sweep(self, weight: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor) -> Tensor:
        """Codes with no larger error in any row, each chosen once more."""
        rows = max(1, _CANDIDATES // (self.beam * max(2**grid.codebook_bits, weight.shape[1])))
        parts = zip(weight.split(rows), codes.split(rows), params.scale.split(rows))
        new = [self._sweep_rows(part, grid, own, AdditiveParams(params.codebooks, s), H) for part, own, s in parts]
        return torch.cat(new)

    def _sweep_rows(self, W: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor) -> Tensor:
        rows = torch.arange(len(W), device=W.device)[:, None]
        size = grid.vector_size
        kept = codes.long()[:, None]  # (rows, beam, groups, codebooks)
        error = (grid.decode(codes, params) - W)[:, None]  # Q - W of each, (rows, beam, in)
        loss = error.new_zeros(len(W), 1)  # less what it was at first
        groups = max(1, _COLUMNS // size)
        for first in range(0, codes.shape[1], groups):
            # what a block of columns needs of all others is one product; within it, what changes is added
            block = slice(first, first + groups)
            columns = slice(first * size, (first + groups) * size)
            here = _Block(kept[:, :, block], error[..., columns], error @ H[:, columns], loss)
            source, here = self._sweep_block(here, params, H[columns, columns])
            kept, error, loss = kept[rows, source], error[rows, source], here.loss
            kept[:, :, block], error[..., columns] = here.codes, here.error
        new = kept[:, 0].to(codes.dtype)
        # sums in float32 drift: only what is better by their definition is taken
        better = _errors(W, grid.decode(new, params), H) < _errors(W, grid.decode(codes, params), H)
        return new.where(better[:, None, None], codes)

    def _sweep_block(self, block: _Block, params: AdditiveParams, H: Tensor) -> tuple[Tensor, _Block]:
        """For each row of codes kept after a block of columns: the one that it comes from, and the block; H its own."""
        codes, error, slope, loss = block
        rows = torch.arange(len(loss), device=loss.device)[:, None]
        _, entries, size = params.codebooks.shape
        scale = params.scale[..., None]  # (rows, 1, 1)
        sources = torch.arange(loss.shape[1], device=loss.device).expand_as(loss)
        for group in range(codes.shape[2]):
            here = slice(group * size, (group + 1) * size)
            for m, codebook in enumerate(params.codebooks):
                # a vector v more changes the loss by 2 v (D H)^T + v H v^T: first the old one is taken away
                old = scale * codebook[codes[:, :, group, m]]
                back = old @ H[here, here]
                without = loss + ((back - 2 * slope[..., here]) * old).sum(-1)
                curvature = ((codebook @ H[here, here]) * codebook).sum(-1)
                candidates = 2 * scale * ((slope[..., here] - back) @ codebook.T) + scale.square() * curvature
                candidates = candidates + without[..., None]  # (rows, beam, entries)
                loss, best = candidates.flatten(1).topk(min(self.beam, candidates[0].numel()), largest=False)
                source, code = best // entries, best % entries
                sources, codes, error = sources[rows, source], codes[rows, source], error[rows, source]
                step = scale * codebook[code] - old[rows, source]
                codes[:, :, group, m] = code
                error[..., here] += step
                slope = slope[rows, source] + step @ H[here]
        return sources, _Block(codes, error, slope, loss)

    def _refit(
        self, weight: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor
    ) -> AdditiveParams:
        """Codebooks and scales of nearly the least error for these codes: each by least squares, twice in turns."""
        for _ in range(2):
            params = _rescaled(weight, grid, codes, params, H)
            params = params._replace(codebooks=self._least_squares(weight, grid, codes, params, H))
        return params

    def _least_squares(
        self, weight: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor
    ) -> Tensor:
        """Codebooks after some steps of conjugate gradients, with the normal equations' diagonal as preconditioner."""

        def weights(codebooks: Tensor) -> Tensor:
            return grid.decode(codes, AdditiveParams(codebooks, params.scale))

        solved = params.codebooks
        with torch.enable_grad():
            leaf = solved.detach().requires_grad_()
            decoded = weights(leaf)

        def transposed(change: Tensor) -> Tensor:
            # decoding is linear in the codebooks
            return torch.autograd.grad(decoded, leaf, change, retain_graph=True)[0]

        diagonal = transposed(params.scale * H.diagonal())
        # vectors that no code stands for stay as they are
        diagonal = diagonal.where(diagonal > 0, 1.0)
        residual = transposed((weight - decoded.detach()) @ H)
        direction, before = torch.zeros_like(solved), math.inf
        for _ in range(self.steps):
            steepest = residual / diagonal
            size = float((residual * steepest).sum(dtype=torch.float64))
            direction = steepest + size / before * direction
            change = weights(direction)
            product = change @ H
            curvature = float((change * product).sum(dtype=torch.float64))
            # the sum of two codebooks is the same where one moves forth and the other back: such ways lead nowhere
            if not curvature > 1e-6 * float((diagonal * direction.square()).sum(dtype=torch.float64)):
                break
            solved = solved + size / curvature * direction
            residual, before = residual - size / curvature * transposed(product), size
        return solved


def _rescaled(weight: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor) -> AdditiveParams:
    """Each row with the scale of the least error; one that decodes to nothing keeps its own."""
    sums = grid.decode(codes, params._replace(scale=torch.ones_like(params.scale)))
    product = sums @ H
    squares = (product * sums).sum(-1, keepdim=True)
    scale = (product * weight).sum(-1, keepdim=True) / squares
    return params._replace(scale=scale.where(squares > 0, params.scale))


def _errors(weight: Tensor, decoded: Tensor, H: Tensor) -> Tensor:
    """(out,): of each row, (w - q) H (w - q)^T."""
    difference = weight - decoded
    return ((difference @ H) * difference).sum(-1, dtype=torch.float64)
