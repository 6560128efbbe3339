"""ABQ's distribution correction: smoothing, ranges and a rank-one change of weights, learnt through a whole block."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.quant.activation import Activation
from tersor.quant.blocks import linears, matches
from tersor.quant.calibration import BlockInputs, token_rows
from tersor.quant.grid import Grid, IntGrid, ScalarGrid
from tersor.quant.processes import most_over_processes, over_processes
from tersor.quant.transform.attention import attentions, divergence
from tersor.quant.transform.fold import Pair, check_scalable, fold_scale, scalable
from tersor.quant.transform.smooth import Smooth, channel_maxima


@dataclass(frozen=True)
class DistributionCorrection:
    """Learns what a block's weights are changed to, before they are rounded to nearest (ABQ-LLM, arXiv:2408.08554).

    Learnt are the scales s of `Smooth`, from alpha = `alpha` on; a share of each group's range beyond which weights are
    clipped, from sigmoid(4) = .982 on (both as OmniQuant has them, arXiv:2308.13137); and, in the first and last blocks,
    W + a b^T for the down projection, a from zero and b from one on. All of it is folded into the weights. Descended is,
    through the rounding of weights and inputs (straight through), the sum of

    - |y - t|^2 / |t|^2 and -log cos(y, t), the cosine a mean over tokens, for both teachers t: what the original model
      puts out there, and what the original block makes of the same inputs as the quantised one;
    - KL(p || q) + KL(q || p) of the attention maps, a mean over their rows, p those of the original model.

    Unlike in the authors' code: squares are relative, so that no term outweighs another by its units; maps enter as
    probabilities, not as logits; scales are learnt as logarithms, a in units of the weights' root mean square; rates
    fall to zero in a straight line. What an epoch ends with counts only if its loss, over all of the calibration data,
    is the least so far, the start's included. Without rounding, and with `clip_rate=0`, this leaves a block's function
    as it was. On the first block of the trained tiny-lm, at 2 bits with a level more and inputs of 8, 160 steps take a
    third off the relative squared error of its outputs, those that learn clips alone a tenth.

    Args:
        activation: that of the recipe; None: inputs are not rounded.
        epochs: passes over the calibration data, a step of AdamW for each batch of it: so give it as an iterable of
            small ones. A few hundred steps are needed.
        alpha: None: nothing is smoothed.
        smoothing_rate: of log s.
        clip_rate: of what goes into the sigmoid. 0: nothing is clipped.
        compensation_rate: of a and b.
        compensated: linears that have a and b, by the end of their names as in `keep`; (): none.
        first: so many of the first blocks have them,
        last: and so many of the last ones.
    """

    activation: Activation | None = None
    epochs: int = 20
    alpha: float | None = 0.5
    smoothing_rate: float = 5e-3
    clip_rate: float = 1e-2
    compensation_rate: float = 1e-2
    compensated: tuple[str, ...] = ("down_proj",)
    first: int = 3
    last: int = 4

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.alpha is not None:
            Smooth(self.alpha)  # checks it
        for name in ("smoothing_rate", "clip_rate", "compensation_rate", "first", "last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        if self.alpha is not None:
            check_scalable(block, inputs, index)

    def fold_taught(
        self,
        block: nn.Module,
        original: nn.Module,
        inputs: Sequence[BlockInputs],
        dense: Sequence[BlockInputs],
        index: int,
        grids: Mapping[nn.Linear, Grid],
    ) -> None:
        smoothing = self._smoothing(block, inputs, index, grids)
        at_an_end = index < self.first or index >= len(inputs[0].arguments) - self.last
        layers: dict[str, _Layer] = {}
        for name, linear in linears(block).items():
            grid = grids.get(linear)
            if grid is None:
                continue
            if not isinstance(grid, ScalarGrid):
                raise TypeError(
                    f"DistributionCorrection clips weight by weight, which {grid} does not round: use an IntGrid"
                )
            compensated = at_an_end and matches(name, self.compensated)
            scale = next(((s, pair.channel_of) for pair, s in smoothing if linear in pair.readers.values()), None)
            layers[name] = _Layer(linear, grid, self.activation, scale, self.clip_rate > 0, compensated)
        if not layers:
            return
        targets = [(each.run(index, original), of_model.run(index, original)) for each, of_model in zip(inputs, dense)]

        def loss(batch: int) -> Tensor:
            with torch.no_grad(), attentions() as wanted_maps:
                dense[batch].run(index, original)
            with attentions() as maps:
                output = inputs[batch].run(index, block)
            mask = inputs[batch].mask
            total = divergence(maps, wanted_maps, mask) + sum(_difference(output, t, mask) for t in targets[batch])
            return torch.as_tensor(total)

        with _standing_in(block, layers):
            self._learn(layers, loss, inputs, index)
        # as it was seen: the change of the weight, then the scale of its columns, then the clip
        for layer in layers.values():
            layer.linear.weight.copy_(layer.moved())
        for pair, log_scale in smoothing:
            fold_scale(pair, log_scale.detach().exp())
        for layer in layers.values():
            layer.linear.weight.copy_(layer.clipped(layer.linear.weight))

    def _smoothing(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> list[tuple[Pair, nn.Parameter]]:
        """Logarithms of the scales, to be learnt, for the pairs of which a reader is rounded."""
        if self.alpha is None:
            return []
        pairs = [p for p in scalable(block, inputs, index) if any(r in grids for r in p.readers.values())]
        smooth, maxima = Smooth(self.alpha), channel_maxima(pairs, block, inputs, index)
        return [(pair, nn.Parameter(smooth.scale(pair, largest).log())) for pair, largest in zip(pairs, maxima)]

    def _learn(
        self,
        layers: Mapping[str, "_Layer"],
        loss: Callable[[int], Tensor],
        inputs: Sequence[BlockInputs],
        index: int,
    ) -> None:
        """Leave in `layers` the best of what epochs end with."""
        # AdamW does not care for a factor; but gradients of an error over all outputs are lost in float16
        batches, outputs = len(inputs), most_over_processes(inputs[0].hidden.numel(), inputs[0].hidden.device)
        rates = {"log_scale": self.smoothing_rate, "low": self.clip_rate, "high": self.clip_rate}
        # readers of one input share a scale
        found = {
            p: rates.get(name, self.compensation_rate)
            for layer in layers.values()
            for name, p in layer.named_parameters()
        }
        parameters = [p for p, rate in found.items() if rate]

        def total() -> float:
            value = float(over_processes(torch.stack([loss(batch) for batch in range(batches)]).double().sum()))
            if not math.isfinite(value):
                raise ValueError(
                    f"block {index}: the loss of DistributionCorrection is {value}: its inputs hold NaN or infinity, or "
                    "the rates are too large"
                )
            return value

        least, best = total(), [p.detach().clone() for p in parameters]
        if not parameters or not least:
            return
        optimiser = torch.optim.AdamW([{"params": [p], "lr": found[p]} for p in parameters], weight_decay=0.0)
        steps = self.epochs * batches
        for step in range(steps):
            with torch.enable_grad():
                # an expert may see none of the batch's tokens
                gradients = torch.autograd.grad(outputs * loss(step % batches), parameters, allow_unused=True)
            for group, p, gradient in zip(optimiser.param_groups, parameters, gradients):
                p.grad = over_processes(torch.zeros_like(p) if gradient is None else gradient)
                group["lr"] = found[p] * (1 - step / steps)
            optimiser.step()
            if (step + 1) % batches == 0 and (now := total()) < least:
                least, best = now, [p.detach().clone() for p in parameters]
        for p, value in zip(parameters, best):
            p.data = value


class _Layer(nn.Module):
    """Stands in place of a linear: y = x^ W^^T with x^ = Q(x / s) and W^ = Q(clip((W + a b^T) s))."""

    def __init__(
        self,
        linear: nn.Linear,
        grid: ScalarGrid,
        activation: Activation | None,
        scale: tuple[nn.Parameter, Tensor] | None,
        clip: bool,
        compensated: bool,
    ) -> None:
        super().__init__()
        self.pieces = linear, grid, activation  # a tuple: the linear is no module of this one
        self.weight = linear.weight.detach().to(torch.promote_types(linear.weight.dtype, torch.float32))
        self.log_scale, self.channel_of = scale or (None, None)
        # what goes into the sigmoid; ranges that are symmetric about zero have one end
        full = self.weight.new_full((len(self.weight), grid.groups(linear.in_features), 1), 4.0)
        self.symmetric = not isinstance(grid, IntGrid) or grid.symmetric
        self.high = nn.Parameter(full) if clip else None
        self.low = nn.Parameter(full.clone()) if clip and not self.symmetric else None
        self.a = nn.Parameter(torch.zeros_like(self.weight[:, :1])) if compensated else None
        self.b = nn.Parameter(torch.ones_like(self.weight[:1])) if compensated else None

    @property
    def linear(self) -> nn.Linear:
        return self.pieces[0]

    def forward(self, x: Tensor) -> Tensor:
        linear, _, activation = self.pieces
        weight = self.moved()
        if self.log_scale is not None:
            s = self.log_scale.exp()[self.channel_of]
            x, weight = x / s.to(x.dtype), weight * s
        if activation:
            x = x + (activation.quantise(x.detach()) - x).detach()
        return F.linear(x, self.rounded(weight).to(x.dtype), linear.bias)

    def moved(self) -> Tensor:
        """W + a b^T."""
        if self.a is None or self.b is None:
            return self.weight
        return self.weight + self.weight.square().mean().sqrt() * self.a * self.b

    def clipped(self, weight: Tensor) -> Tensor:
        """`weight` (out, in), what lies beyond the learnt range put at its end."""
        grouped, low, high = self._range(weight)
        return grouped.clamp(low, high).flatten(-2)

    def rounded(self, weight: Tensor) -> Tensor:
        """The clipped weight, rounded to nearest; with gradients of the range (arXiv:2308.13137), and of the weight.

        With u = (w - low) / (high - low) as it is rounded, w^ = low + (high - low) u: beyond the range an end of it, and
        within it rounding does nothing but to the gradients of the ends, which are its error.
        """
        grid = self.pieces[1]
        grouped, low, high = self._range(weight)
        with torch.no_grad():
            clipped = grouped.clamp(low, high).flatten(-2)
            levels = grid.decode(grid.encode(clipped, params := grid.fit(clipped)), params).view_as(grouped)
        span = torch.where(high > low, high - low, 1.0)
        u = ((grouped - low) / span).clamp(0, 1)
        u = u + ((levels - low) / span - u).detach()
        return (low + span * u).flatten(-2)

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`weight` (out, groups, group_size), and the ends of the ranges (out, groups, 1)."""
        grouped = weight.unflatten(-1, (self.pieces[1].groups(weight.shape[-1]), -1))
        if self.symmetric:
            high = grouped.abs().amax(-1, keepdim=True) * (1.0 if self.high is None else self.high.sigmoid())
            return grouped, -high, high
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        if self.low is not None and self.high is not None:
            low, high = low * self.low.sigmoid(), high * self.high.sigmoid()
        return grouped, low, high


@contextmanager
def _standing_in(block: nn.Module, layers: Mapping[str, _Layer]) -> Iterator[None]:
    """Inside, the layers are in the places of their linears, and nothing else has gradients."""
    requires_grad = {p: p.requires_grad for p in block.parameters()}
    block.requires_grad_(False)
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            block.set_submodule(name, layer.linear)
        for parameter, wanted in requires_grad.items():
            parameter.requires_grad_(wanted)


def _difference(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """|y - t|^2 / |t|^2 - log cos(y, t)."""
    wide = torch.promote_types(output.dtype, torch.float32)
    y, t = (token_rows(tensor, mask).to(wide) for tensor in (output, target))
    cosine = F.cosine_similarity(y, t, -1).mean()
    # 1e-3: the logarithm must not see outputs that point the other way
    return (y - t).square().sum() / t.square().sum() - cosine.clamp(min=1e-3).log()
