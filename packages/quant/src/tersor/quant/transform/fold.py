"""Scales of channels: where a block lets one module's output be divided by what its readers' weights are multiplied with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersor.quant.blocks import linears
from tersor.quant.calibration import BlockInputs, Pass, shared_inputs, token_rows
from tersor.quant.transform.protocol import UnsupportedFold


class Pair(NamedTuple):
    """A module, and all that reads its output: dividing the one and multiplying the others by a scale changes nothing.

    What lies between may be anything that treats channels alike: nothing (norm -> q, k, v), a product with other numbers
    (up -> down), a mean over tokens (v -> o).
    """

    name: str
    source: Any  # a norm or a linear
    readers: dict[str, nn.Linear]
    # what is no plain linear and reads it too (router, experts): columns (..., in) of these must be scaled with it
    others: dict[str, nn.Parameter]
    channel_of: Tensor  # (in,): the channel of the source that an input channel of the readers is; heads may share one

    @property
    def channels(self) -> int:
        """Of the source."""
        return len(self.source.weight)

    def per_channel(self, values: Tensor, reduce: str) -> Tensor:
        """`values` (in,) of the readers' inputs for the source's channels: "mean" or "amax" over those that share one."""
        index = self.channel_of.to(values.device)
        return values.new_zeros(self.channels).scatter_reduce(0, index, values, reduce, include_self=False)


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """The norms of `module` by name: modules without children whose weight is a vector."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(weight := getattr(child, "weight", None), nn.Parameter)
        and weight.ndim == 1
        and not any(child.children())
    }


@torch.no_grad()
def find_pairs(
    module: nn.Module, run: Callable[[], Tensor], sources: Mapping[str, nn.Module] | None = None
) -> list[Pair]:
    """The pairs of `module` that one of `sources` begins, found by trying; default: all of its norms and linears.

    The output of each source is multiplied by powers of two, 1/4 to 4, which floating-point numbers commute with
    exactly. Whoever is then given its usual input times these powers reads the source, and is given its usual input
    instead; if the output of `run` is the same as ever, bit for bit, there was no other reader.

    Args:
        run: a pass through `module`, in evaluation mode; the same at every call.
    """
    sources = norms(module) | linears(module) if sources is None else sources
    inputs: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        inputs.setdefault(name, []).append(x)

    candidates = {
        name: child
        for name, child in module.named_modules()
        if any(parameter.ndim > 1 for parameter in child.parameters(recurse=False))
    }
    with _given(candidates, note):
        output = run()
    found = []
    for name, source in sources.items():
        weight: Any = source.weight
        widths = [x[0].shape[-1] for reader, x in inputs.items() if reader != name]
        of_norm = type(source) is not nn.Linear
        if not any(width % len(weight) == 0 for width in widths) or (of_norm and offset(source) is None):
            continue
        powers = torch.randint(-2, 3, weight.shape[:1], generator=torch.Generator().manual_seed(0))
        scale = (2.0**powers).to(weight)
        readers, index = _readers(source, scale, candidates, inputs, run, output)
        if not readers:
            continue
        plain = {reader: child for reader in readers if type(child := candidates[reader]) is nn.Linear}
        others = _columns({reader: candidates[reader] for reader in readers if reader not in plain}, len(scale))
        pair = Pair(name, source, plain, others, index)
        if len(plain) == len(readers) or _others_suffice(pair, scale, inputs, run, output):
            found.append(pair)
    return found


def _whole_pass(block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> Callable[[], Tensor]:
    """A pass that calls all linears of `block`: one that is not called would not be seen to read anything."""
    missing = ""
    for each in inputs:
        run = partial(each.run, index, block)
        missing = next((names[0] for names, calls in shared_inputs(linears(block), run) if not calls), "")
        if not missing:
            return run
    raise ValueError(
        f"no batch of the calibration data reaches all linears of block {index}: {missing} is not called; give larger batches"
    )


def check_scalable(block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
    """Raises UnsupportedFold if `scalable` would; quicker, where a norm is among the pairs."""
    pairs = find_pairs(block, lambda: inputs[0].run(index, block), norms(block))
    if not any(pair.readers for pair in pairs):
        scalable(block, inputs, index)


def scalable(block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> list[Pair]:
    """The pairs of `block` that linears read.

    Raises:
        UnsupportedFold: there are none.
        ValueError: of none of the batches every linear is given something: every expert, say.
    """
    pairs = find_pairs(block, _whole_pass(block, inputs, index))
    if found := [pair for pair in pairs if pair.readers]:
        return found
    raise UnsupportedFold(
        f"{type(block).__name__} has no norm or linear whose channels can be scaled by what only linears read: leave this "
        "transform out"
    )


def observe(pairs: Sequence[Pair], runs: Sequence[Pass], take: Callable[[int, Tensor], None]) -> None:
    """Run all of `runs`; `take` is given the number of a pair and what its readers are given, (tokens, in), without padding."""
    for run, mask in runs:
        handles = [
            _observed(pair, lambda x, i=i, mask=mask: take(i, token_rows(x, mask))) for i, pair in enumerate(pairs)
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()


def _observed(pair: Pair, see: Callable[[Tensor], None]) -> RemovableHandle:
    if isinstance(pair.source, nn.Linear):
        reader = next(iter(pair.readers.values()))
        return reader.register_forward_pre_hook(lambda module, arguments: see(arguments[0]))
    # at the norm: an expert would see only its own tokens
    return pair.source.register_forward_hook(lambda module, arguments, output: see(output))


@torch.no_grad()
def fold_scale(pair: Pair, scale: Tensor) -> None:
    """Divide the output of the pair's source by `scale` (channels of the source), and multiply its readers' columns by it.

    A norm is divided by the scale that its rounded weight then stands for, so that in half precision no more than the
    readers' rounding is left (Gemma's 1 + w near zero would be off by a multiple). Where that is zero or overflows, the
    channel keeps the scale 1.

    Raises:
        ValueError: a scale is not positive, or a weight would overflow; nothing was changed.
        UnsupportedFold: the source is a norm that `find_pairs` would not have found.
    """
    if scale.shape != (pair.channels,) or not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(f"{pair.name}: scales must be {pair.channels} positive numbers, got {scale}")
    weight: Tensor = pair.source.weight
    bias: Tensor | None = getattr(pair.source, "bias", None)
    scale = scale.to(weight.device, torch.float64)
    changed: list[tuple[Tensor, Tensor]] = []
    if isinstance(pair.source, nn.Linear):
        changed.append((weight, weight.double() / scale[:, None]))
    else:
        one = offset(pair.source)
        if one is None:
            raise UnsupportedFold(f"{pair.name} multiplies neither by its weight nor by 1 + its weight")
        factor = weight.double() + one
        reached = (factor / scale - one).to(weight.dtype).double() + one
        reached = torch.where(reached.isfinite() & (reached != 0), reached, factor)
        scale = torch.where(factor != 0, factor / reached, 1.0)
        changed.append((weight, reached - one))
    if bias is not None:
        changed.append((bias, bias.double() / scale))
    of_input = scale[pair.channel_of.to(scale.device)]
    for columns in (*(reader.weight for reader in pair.readers.values()), *pair.others.values()):
        changed.append((columns, columns.double() * of_input.to(columns.device)))
    rounded = [(parameter, value.to(parameter.dtype)) for parameter, value in changed]
    for parameter, value in rounded:
        if not value.isfinite().all() and parameter.isfinite().all():
            raise ValueError(
                f"{pair.name}: scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} make weights overflow "
                f"{parameter.dtype}; use a wider dtype"
            )
    for parameter, value in rounded:
        parameter.copy_(value)


def offset(norm: nn.Module) -> float | None:
    """o of a norm that multiplies by (weight + o): 0, or 1 as in Gemma; None if it does neither."""
    weight: Any = norm.weight
    x = torch.linspace(-1, 2, len(weight), device=weight.device).to(weight.dtype)[None]
    zeros = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    for o in (0.0, 1.0):
        try:
            output = torch.func.functional_call(norm, zeros | {"weight": torch.full_like(weight, -o)}, (x,))
        except TypeError:
            # it takes a gate besides
            return None
        if not output.any():
            return o
    return None


@contextmanager
def rounded(scales: Mapping[nn.Linear, Tensor | None], grids: Mapping[nn.Linear, Any]) -> Iterator[None]:
    """Inside, the linears' weights are Q(W s) / s, Q rounding to nearest: what they will be once `s` (in,) is folded.

    Those without a grid stay as they are.
    """
    originals = {linear: linear.weight.data for linear in scales if linear in grids}
    try:
        for linear, original in originals.items():
            weight, grid, scale = original.float(), grids[linear], scales[linear]
            s = 1.0 if scale is None else scale.float()
            params = grid.fit(weight * s)
            linear.weight.data = (grid.decode(grid.encode(weight * s, params), params) / s).to(linear.weight.dtype)
        yield
    finally:
        for linear, weight in originals.items():
            linear.weight.data = weight


def _readers(
    source: nn.Module,
    scale: Tensor,
    candidates: Mapping[str, nn.Module],
    inputs: Mapping[str, list[Tensor]],
    run: Callable[[], Tensor],
    output: Tensor,
) -> tuple[list[str], Tensor]:
    """Names of what reads `source`, and the channel that each of their inputs is; no names if anything else reads it."""
    found: list[str] = []
    index: Tensor | None = None
    calls: dict[str, int] = {}

    def give_back(name: str, x: Tensor) -> Tensor | None:
        nonlocal index
        number = calls[name] = calls.get(name, 0) + 1
        if candidates[name] is source:
            return None
        usual = inputs[name][number - 1] if number <= len(inputs[name]) else None
        if usual is None or x.shape != usual.shape:
            raise _ReadOtherwise
        if torch.equal(x, usual):
            return None
        for candidate in _repeats(len(scale), x.shape[-1]) if index is None else [index]:
            if len(candidate) == x.shape[-1] and _equal(x, usual * scale[candidate]):
                index = candidate
                if name not in found:
                    found.append(name)
                return usual
        raise _ReadOtherwise

    try:
        with _multiplied(source, scale), _given(candidates, give_back):
            same = torch.equal(run(), output)
    except _ReadOtherwise:
        same = False
    return (found, index) if same and index is not None else ([], torch.empty(0))


class _ReadOtherwise(Exception):
    """Ends a pass in which a module was given what is neither its usual input nor that, scaled."""


def _equal(x: Tensor, expected: Tensor) -> bool:
    """Up to the rounding of numbers too small for all of their bits, which are frequent in float16."""
    smallest = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    return torch.allclose(x, expected, rtol=0, atol=4 * smallest)


def _repeats(channels: int, width: int) -> Iterator[Tensor]:
    """Ways in which `width` inputs can be `channels` channels: one by one, or each head of some size repeated."""
    every = torch.arange(channels)
    if width == channels:
        yield every
    elif width % channels == 0:
        for head_dim in range(channels, 0, -1):
            if channels % head_dim == 0:
                yield every.view(-1, head_dim).repeat_interleave(width // channels, 0).flatten()


def _columns(readers: Mapping[str, nn.Module], width: int) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{own}": parameter
        for name, reader in readers.items()
        for own, parameter in reader.named_parameters(recurse=False)
        if parameter.ndim > 1 and parameter.shape[-1] == width
    }


def _others_suffice(
    pair: Pair, scale: Tensor, inputs: Mapping[str, list[Tensor]], run: Callable[[], Tensor], output: Tensor
) -> bool:
    """Whether all that is no linear is undone by what is to be scaled in it."""
    seen: dict[str, int] = {}

    def give_back(name: str, x: Tensor) -> Tensor:
        seen[name] = seen.get(name, 0) + 1
        return inputs[name][seen[name] - 1]

    originals = {name: parameter.data for name, parameter in pair.others.items()}
    try:
        for name, parameter in pair.others.items():
            parameter.data = originals[name] / scale
        with _multiplied(pair.source, scale), _given(pair.readers, give_back):
            return torch.equal(run(), output)
    finally:
        for name, parameter in pair.others.items():
            parameter.data = originals[name]


@contextmanager
def _multiplied(source: Any, scale: Tensor) -> Iterator[None]:
    handle = source.register_forward_hook(lambda module, arguments, output: output * scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _given(modules: Mapping[str, nn.Module], do: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, `do` sees the input of every call of `modules`, and may return another."""

    def hook(name: str) -> Callable[..., Any]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not arguments or not isinstance(arguments[0], Tensor):
                return None
            x = do(name, arguments[0])
            return None if x is None else (x, *arguments[1:])

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
