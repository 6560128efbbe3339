"""Beam search over codes, in turns with gradient descent on codebooks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid import AdditiveGrid, AdditiveParams, Grid
from tersor.quant.solver.result import Result

# errors of candidates that are held at a time: 64 MiB
_CANDIDATES = 2**24


@dataclass(frozen=True)
class BeamSearch:
    """Lowers tr((W - Q) H (W - Q)^T) for sums of codebooks' vectors (AQLM, arXiv:2401.06118, algorithm 1).

    From the k-means of the weights, in turns: Adam on codebooks and scales, and for each row a sweep over its codes that
    keeps the `beam` best rows of codes so far, each vector chosen given all others. No turn raises the error; they end
    once one lowers it by less than `tolerance`. The last sweep takes codebooks and scales as they are stored. Unlike the
    authors' code, which has amsgrad instead, Adam's best step is kept, and its rate counts in the size of what it changes.

    Args:
        beam: rows of codes kept in a sweep.
        tolerance: relative.
        max_turns: ends them in any case.
        steps: of Adam in a turn.
        rate: of Adam, as a share of the root mean square of codebooks, or scales.
    """

    beam: int = 2
    tolerance: float = 0.01
    max_turns: int = 20
    steps: int = 50
    rate: float = 5e-3
    needs_hessian = True

    def __post_init__(self) -> None:
        for name in ("beam", "max_turns", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.tolerance > 0 or not self.rate > 0:
            raise ValueError(f"tolerance and rate must be positive, got {self.tolerance} and {self.rate}")

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
            params = self._descend(weight, grid, codes, params, H)
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
        (_, groups, num_codebooks), size = codes.shape, grid.vector_size
        entries = 2**grid.codebook_bits
        kept = codes.long()[:, None]  # (rows, beam, groups, codebooks)
        error = (grid.decode(codes, params) - W)[:, None]  # Q - W of each, (rows, beam, in)
        loss = error.new_zeros(len(W), 1)  # less what it was at first
        scale = params.scale[..., None]  # (rows, 1, 1)
        for group in range(groups):
            here = slice(group * size, (group + 1) * size)
            for m in range(num_codebooks):
                codebook = params.codebooks[m]
                # a vector v more changes the loss by 2 v (D H)^T + v H v^T: first the old one is taken away
                old = scale * codebook[kept[:, :, group, m]]
                slope = error @ H[:, here]
                curvature = ((codebook @ H[here, here]) * codebook).sum(-1)
                change = 2 * (slope * -old).sum(-1) + ((old @ H[here, here]) * old).sum(-1)
                slope = slope - old @ H[here, here]
                candidates = 2 * scale * (slope @ codebook.T) + scale.square() * curvature
                candidates = candidates + (loss + change)[..., None]  # (rows, beam, entries)
                loss, best = candidates.flatten(1).topk(min(self.beam, candidates[0].numel()), largest=False)
                source, code = best // entries, best % entries
                error, kept, old = error[rows, source], kept[rows, source], old[rows, source]
                error[..., here] += scale * codebook[code] - old
                kept[:, :, group, m] = code
        new = kept[:, 0].to(codes.dtype)
        # sums in float32 drift: only what is better by their definition is taken
        better = _errors(W, grid.decode(new, params), H) < _errors(W, grid.decode(codes, params), H)
        return new.where(better[:, None, None], codes)

    def _descend(
        self, weight: Tensor, grid: AdditiveGrid, codes: Tensor, params: AdditiveParams, H: Tensor
    ) -> AdditiveParams:
        """Codebooks and scales of the least error on the way of Adam."""
        learnt = [p.detach().clone().requires_grad_() for p in params]
        groups = [{"params": [p], "lr": self.rate * float(p.detach().square().mean().sqrt())} for p in learnt]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        best, least = params, math.inf
        for step in range(self.steps + 1):
            with torch.enable_grad():
                decoded = grid.decode(codes, AdditiveParams(*learnt))
            difference = decoded.detach() - weight
            slope = difference @ H
            error = float((slope * difference).sum(dtype=torch.float64))
            if error < least:
                best, least = AdditiveParams(*(p.detach().clone() for p in learnt)), error
            if step < self.steps:
                optimizer.zero_grad()
                # H is symmetric: one product with it gives the error and its gradient
                decoded.backward(2 * slope)
                optimizer.step()
        return best


def _errors(weight: Tensor, decoded: Tensor, H: Tensor) -> Tensor:
    """(out,): of each row, (w - q) H (w - q)^T."""
    difference = weight - decoded
    return ((difference @ H) * difference).sum(-1, dtype=torch.float64)
