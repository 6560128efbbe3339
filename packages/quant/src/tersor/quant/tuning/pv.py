"""PV-tuning: codes and what is continuous, learnt in turns from what the original model predicts."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.quant.grid import AdditiveGrid, Grid
from tersor.quant.grid.protocol import Params
from tersor.quant.processes import mean_over_processes
from tersor.quant.teacher import Teacher
from tersor.quant.tuning.adamw import RelativeAdamW, learnable, undone_unless_better
from tersor.quant.tuning.batches import shuffled_rows
from tersor.quant.tuning.trainable import TrainableLinear, trainable

# of so many sequences one is not learnt from
_HELD_OUT = 8


@dataclass(frozen=True)
class PV:
    """Lowers the divergence from the original model by steps on the codes too (arXiv:2405.14852, algorithms 1 and 3).

    In each step, one gradient serves both. P: AdamW on scales, codebooks and whatever else is continuous. V: the weights
    of a layer move by - eta g~, g~ the gradient over the root of its running mean square; of the codes that this would
    change, only those with the longest way to go are changed. Weights that are rounded lose small steps, and all of them
    moving by large ones go astray: large steps of few weights do neither.

    Args:
        steps: of both kinds.
        batch_size: sequences of the calibration data for each step.
        rate: of what is continuous, as a share of its root mean square; falls to zero in a straight line.
        code_rate: eta, so that a layer's weights would move by this share of what rounding costs them: of their norm over
            2^bits, bits as stored for each weight. Falls in the same way.
        max_code_change: the share of a layer's codes that may change in a step (at least one may); 0: none at all.
        trust_ratio: so far a layer's weights may move in a step, as a share of their norm (but for one code); None:
            any way.
        decay: 0: steps that changed no code add up, as in straight-through estimation; this and the limits on changes are
            what the authors' command does. 1: they are forgotten, as in the paper; `code_rate` must then be larger, 2.
        also: other parameters of the model that are learnt, by the ends of their names as in `keep`.
        top_k: of the original model's predictions, those that are kept (see `Teacher`); None: all.
        seed: of the order of the sequences.
    """

    steps: int = 100
    batch_size: int = 8
    rate: float = 2e-3
    code_rate: float = 0.15
    max_code_change: float = 0.01
    trust_ratio: float | None = None
    decay: float = 0.0
    also: tuple[str, ...] = ("*norm", "bias")
    top_k: int | None = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rate", "code_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_code_change", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if self.trust_ratio is not None and not self.trust_ratio > 0:
            raise ValueError(f"trust_ratio must be positive or None, got {self.trust_ratio}")

    def tune(self, model: Any, teacher: Teacher) -> None:
        count = len(teacher.rows)
        held_out = range(0, count, _HELD_OUT)
        learnt = [row for row in range(count) if row % _HELD_OUT] or held_out

        def error() -> float:
            return teacher.divergence(held_out)

        with undone_unless_better(model, error), trainable(model) as layers:
            optimizer = RelativeAdamW(learnable(model, self.also), self.rate, self.steps)
            moves = [_CodeMoves(layer, self) for layer in layers.values()] if self.max_code_change else []
            for step, rows in enumerate(shuffled_rows(len(learnt), self.batch_size, self.steps, self.seed)):
                teacher.backward([learnt[row] for row in rows])
                left = 1 - step / self.steps
                targets = [move.target(self.code_rate * left) for move in moves]
                optimizer.step()
                for move, target in zip(moves, targets):
                    move.take(target)


class _CodeMoves:
    """The V steps of one layer."""

    def __init__(self, layer: TrainableLinear, settings: PV) -> None:
        self.layer, self.settings, self.count = layer, settings, 0
        weight = layer.weight.detach()
        layer.offset = torch.zeros_like(weight, requires_grad=True)
        self.square = torch.zeros_like(weight)
        (stored,) = layer.layer
        bits = 8 * sum(buffer.nbytes for buffer in stored.stored().values()) / weight.numel()
        self.reach = 2**-bits * weight.norm()
        # how far the weights would be from what is decoded
        self.behind = torch.zeros_like(weight) if settings.decay < 1 else None

    @torch.no_grad()
    def target(self, rate: float) -> Tensor:
        """Where the gradient of the weights leads, (out, in)."""
        weight, offset = self.layer.weight, self.layer.offset
        gradient = torch.zeros_like(weight) if offset is None or offset.grad is None else offset.grad
        gradient = mean_over_processes(gradient)
        self.layer.offset = torch.zeros_like(weight, requires_grad=True)
        if self.behind is not None:
            weight = weight + self.behind
        self.count += 1
        # the authors' moments: 0 and .95
        self.square.lerp_(gradient.square(), 1 - 0.95)
        tiny = torch.finfo(gradient.dtype).tiny
        direction = gradient / (self.square / (1 - 0.95**self.count)).sqrt().clamp(min=tiny)
        return weight - rate * self.reach / direction.norm().clamp(min=tiny) * direction

    @torch.no_grad()
    def take(self, target: Tensor) -> None:
        layer, settings = self.layer, self.settings
        layer.codes = moved_codes(
            layer.grid, layer.codes, layer.params, target, settings.max_code_change, settings.trust_ratio
        )
        if self.behind is not None:
            self.behind = (1 - settings.decay) * (target - layer.weight)


def moved_codes(
    grid: Grid,
    codes: Tensor,
    params: Params,
    target: Tensor,
    max_change: float,
    trust_ratio: float | None = None,
) -> Tensor:
    """`codes` after one V step: those furthest from `target` (out, in) are encoded anew where that is nearer to it.

    Of an `AdditiveGrid`, the furthest four times `max_change` are tried.

    Args:
        max_change: the share of the codes that may change, rounded up.
        trust_ratio: |W^_new - W^| / |W^| stays below it, or one code alone changes.
    """
    rows, groups = codes.shape[:2]
    if rows != target.shape[0] or target.shape[1] % groups:
        raise TypeError(f"PV moves codes of neighbours in a row, which those of {type(grid).__name__} are not")
    old, wanted = grid.decode(codes, params).reshape(rows * groups, -1), target.reshape(rows * groups, -1)
    way = (wanted - old).square().sum(-1)
    most = math.ceil(max_change * len(way))
    # a beam search is dear: it is made for the likeliest alone
    likely = way.argsort(descending=True)[: 4 * most if isinstance(grid, AdditiveGrid) else None]
    new, there = _encoded(grid, target, params, groups, likely)
    # of two equally near, the old one stays
    nearer = ((wanted[likely] - there).square().sum(-1) < way[likely]).nonzero()[:most, 0]
    of, new, there = likely[nearer], new[nearer], there[nearer]
    moves = (there - old[of]).square().sum(-1)
    allowed = torch.ones_like(of, dtype=torch.bool)
    if trust_ratio is not None:
        allowed = moves.cumsum(0).sqrt() <= trust_ratio * old.norm()
        allowed[:1] = True
    changed = codes.flatten(0, 1).clone()
    changed[of[allowed]] = new[allowed]
    return changed.view_as(codes)


def _encoded(grid: Grid, target: Tensor, params: Params, groups: int, some: Tensor) -> tuple[Tensor, Tensor]:
    """Of the codes `some`, `groups` in each row: those nearest to `target` (out, in), and what they stand for."""
    if isinstance(grid, AdditiveGrid):
        # each vector is a row of its own
        params = params._replace(scale=params.scale[some // groups])
        codes = grid.encode(target.view(-1, grid.vector_size)[some], params)
        return codes[:, 0], grid.decode(codes, params)
    codes = grid.encode(target, params)
    return codes.flatten(0, 1)[some], grid.decode(codes, params).view(target.shape[0] * groups, -1)[some]
