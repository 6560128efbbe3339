"""PTQ1.61's preprocessing: the model is quantised, restored by low-rank changes, and with these quantised again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.blocks import matches
from tersor.quant.linear import QuantizedLinear
from tersor.quant.processes import num_processes
from tersor.quant.teacher import Teacher
from tersor.quant.tuning.adamw import RelativeAdamW, learnable
from tersor.quant.tuning.batches import shuffled_rows
from tersor.quant.tuning.trainable import TrainableLinear, trainable

if TYPE_CHECKING:
    from tersor.quant.recipe import Recipe


class RestoredLinear(TrainableLinear):
    """A layer that stays as it is stored; beside it, once there is `add_low_rank`, alpha / r B A is learnt."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        for name in self._kind._fields:
            if name not in self._fixed:
                getattr(self, name).requires_grad_(False)
        self._weight = super().weight.detach()
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self._scaling = 0.0

    @property
    def weight(self) -> Tensor:
        return self._weight

    def add_low_rank(self, rank: int, alpha: float, generator: torch.Generator) -> None:
        """A (rank, in) as a linear layer's weight is at first, B (out, rank) zero: what is computed stays the same."""
        (layer,) = self.layer
        A = torch.rand(rank, layer.in_features, generator=generator) * 2 - 1
        self.A = nn.Parameter((A / math.sqrt(layer.in_features)).to(self._weight.device))
        self.B = nn.Parameter(self._weight.new_zeros(layer.out_features, rank))
        self._scaling = alpha / rank

    @property
    def change(self) -> Tensor:
        """alpha / r B A, (out, in)."""
        if self.A is None or self.B is None:
            return torch.zeros_like(self._weight)
        return self._scaling * (self.B.detach() @ self.A.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.A is None or self.B is None:
            return y
        return y + (self._scaling * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)

    def store(self) -> QuantizedLinear:
        (layer,) = self.layer
        return layer


@dataclass(frozen=True)
class RestorativePreprocess:
    """W + alpha / r B A is quantised in the place of W, A and B being what restores the quantised model (arXiv:2502.13179).

    Once the model is quantised, low-rank matrices beside its layers are trained (LoRA, arXiv:2106.09685), merged into the
    original weights, and these quantised in the same way. So what is stored takes the same bytes. The paper calls this a
    preprocessing, but it needs the whole model end to end, first quantised and then as it was: so it comes after the walk,
    where layers still know the weights that they stand for, and walks once more.

    Unlike the paper, what is lowered is the divergence from what the original model predicts for the calibration data,
    not the loss of that text itself: in two blocks of tiny-lm, 60 steps on the loss of 30 thousand tokens end at a
    divergence, on other text, of .513 where .435 was without them, those on the divergence at .370; a tenth of the rate
    does the loss no good either. There is no dropout. In the whole of tiny-lm, on 4096 tokens, 60 steps take the divergence
    from .541 to .386 to .389, by the seed. In its last two blocks, 40 steps take a sixth off, and three times the steps of
    `BlockScales`, without this, a third as much.

    If the second quantisation has no less divergence over the calibration data, the first one stays, bit for bit: so it is
    after no steps, or after too many or too large ones.

    What tunings changed besides quantised layers (norms, say) is where the second quantisation starts from. If any of this
    fails, the layers are given back with their original weights.

    Args:
        recipe: how the model was quantised, and will be again: the recipe that this is in, without it.
        rank: r.
        alpha: over r, what B A is multiplied by.
        steps: of AdamW. 2500 of 8 sequences are the 20000 of the authors' command; where there is little text 100 will do.
        batch_size: sequences of the calibration data for each step, and for each batch of the second quantisation.
        rate: of A as a share of its root mean square, of B as it is; falls to zero in a straight line. The authors' 1e-4 is
            for thousands of steps.
        layers: those that are changed, by the ends of their names as in `keep`; all others are quantised as they were.
        top_k: of the teacher's predictions, those that are kept for each token (see `Teacher`); None: all.
        seed: of A and of the order of the sequences.
    """

    recipe: "Recipe"
    rank: int = 64
    alpha: float = 16.0
    steps: int = 2500
    batch_size: int = 8
    rate: float = 1e-2
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    top_k: int | None = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        for name in ("alpha", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.recipe.compensation is not None:
            raise NotImplementedError(
                f"RestorativePreprocess merges into weights, of which {self.recipe.compensation} may hold a part: leave one out"
            )

    def tune(self, model: Any, teacher: Teacher) -> None:
        # the walk imports the tunings
        from tersor.quant.quantize import quantize

        def error() -> float:
            return teacher.divergence()

        first = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        weights = {name: _original(name, layer) for name, layer in first.items()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        grids = {name: layer.scheme.grid for name, layer in first.items()}
        before = error()
        try:
            changes = self.changes(model, teacher)
            for name, layer in first.items():
                merged = weights[name] + changes[name] if name in changes else weights[name]
                model.set_submodule(name, _linear(layer, merged, model.dtype))
            data = grouped(teacher.rows, self.batch_size)
            quantize(model, self.recipe, data, keep=_dense_parts(model, first), allocation=grids)
        except Exception:
            for name, layer in first.items():
                model.set_submodule(name, _linear(layer, weights[name], model.dtype))
            raise
        if not error() < before:
            for name, layer in first.items():
                model.set_submodule(name, layer)
            model.load_state_dict(state)

    def changes(self, model: Any, teacher: Teacher) -> dict[str, Tensor]:
        """alpha / r B A (out, in), by the layer's name, once it is learnt; the quantised `model` stays as it is.

        Raises:
            ValueError: `layers` names none of the quantised layers.
        """
        generator = torch.Generator().manual_seed(self.seed)
        with trainable(model, RestoredLinear) as every:
            chosen: dict[str, RestoredLinear] = {}
            for name, layer in every.items():
                if matches(name, self.layers) and isinstance(layer, RestoredLinear):
                    layer.add_low_rank(self.rank, self.alpha, generator)
                    chosen[name] = layer
            if not chosen:
                raise ValueError(
                    f"layers={self.layers} names none of the quantised linears, which are {', '.join([*every][:7])} ...: "
                    "give the ends of their names"
                )
            optimizer = RelativeAdamW(learnable(model, ()), self.rate, self.steps)
            order = shuffled_rows(len(teacher.rows), self.batch_size, self.steps, self.seed) if self.steps else ()
            for rows in order:
                teacher.backward(rows)
                optimizer.step()
            return {name: layer.change for name, layer in chosen.items()}


def _original(name: str, layer: QuantizedLinear) -> Tensor:
    """The weight (out, in) that was quantised, as it was before the layer's own transform."""
    if layer.scheme.compensation is not None:
        raise NotImplementedError(f"{name}: {layer.scheme.compensation} may hold a part of the weight: leave it out")
    if layer.original is None:
        raise ValueError(f"{name}: the weight that was quantised is known only within `quantize`")
    transform = layer.scheme.transform
    original = transform.undo(layer.original, layer.stored("transform")) if transform else layer.original
    return original[:, : layer.in_features]


def _linear(layer: QuantizedLinear, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A linear of this weight with the bias of `layer`."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
    linear.weight = nn.Parameter(weight.to(dtype))
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear


def _dense_parts(model: nn.Module, quantized: Mapping[str, nn.Module]) -> list[str]:
    """What `keep` must name, so that those that were `quantized` and no others are so again."""
    owners = {".".join(name.split(".")[:end]) for name in quantized for end in range(name.count(".") + 2)}
    return [
        name
        for name, module in model.named_modules()
        # experts in one parameter are kept as a whole
        if name not in owners and (isinstance(module, nn.Linear) or any(p.ndim == 3 for p in module.parameters(False)))
    ]


def grouped(rows: Sequence[Mapping[str, Tensor]], batch_size: int) -> list[dict[str, Tensor]]:
    """`rows` (1, seq_len) as batches for `quantize`, those of one length together while they follow each other."""
    # of several processes, `quantize` gives each every n-th sequence: of each one n, so that all go on with their own
    repeats = num_processes()
    found = []
    for _, same in groupby(rows, lambda row: (row["input_ids"].shape, row.keys())):
        same = list(same)
        for start in range(0, len(same), batch_size):
            part = same[start : start + batch_size]
            batch = {name: torch.cat([row[name] for row in part]) for name in part[0]}
            found.append({name: tensor.repeat_interleave(repeats, 0) for name, tensor in batch.items()})
    return found
