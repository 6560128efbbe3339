"""Hadamard rotations: no channel sticks out of what is rounded (arXiv:2404.00456, QuaRot; arXiv:2307.13304, QuIP).

QuaRot's R1 is `RotateResidual`, R2 `RotateHeads`, R4 `Hadamard(layers=("down_proj",))`. R3 rotates queries and keys for
the sake of a key-value cache, and belongs there.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.kernels import hadamard
from tersor.kernels.hadamard.matrix import is_order
from tersor.quant.blocks import find_blocks, linears
from tersor.quant.calibration import block_inputs
from tersor.quant.grid.protocol import Buffer, Grid, Stored
from tersor.quant.transform.fold import Pair, find_pairs, norms, offset
from tersor.quant.transform.protocol import UnsupportedFold

_WAY_OUT = "rotate the layers' inputs instead, at run time: Hadamard()"


@dataclass(frozen=True)
class Hadamard:
    """x T of a layer's input at run time, T = D H / sqrt(n): random signs D, then a Hadamard transform.

    Works in any model, at n log n operations per token and layer; nothing is stored.

    Args:
        block_size: inputs that are mixed with one another; must divide the layer's `in`. None: all of them where there
            is a Hadamard matrix of that order, else the largest power of two that divides it.
        seed: of the signs.
        layers: linears that it is applied to, by the ends of their names: QuaRot's R4 is ("down_proj",). (): all.
    """

    block_size: int | None = None
    seed: int = 0
    layers: tuple[str, ...] = ()
    needs_hessian = False

    def __post_init__(self) -> None:
        if self.block_size is not None and not (self.block_size > 1 and is_order(self.block_size)):
            raise ValueError(f"there is no Hadamard matrix of order block_size = {self.block_size}; use a power of two")

    def check(self, in_features: int) -> None:
        if in_features % self.order(in_features):
            raise ValueError(
                f"in = {in_features} is not a multiple of block_size = {self.block_size}; use block_size = None"
            )
        if self.order(in_features) == 1:
            raise ValueError(f"in = {in_features} is odd: there is no Hadamard matrix to rotate it with")

    def order(self, in_features: int) -> int:
        """Inputs that are mixed with one another."""
        return self.block_size or _order(in_features)

    def layout(self, in_features: int) -> dict[str, Buffer]:
        return {}

    def fit(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor, stored: Stored) -> Tensor:
        return hadamard(x * self._signs(x), self.order(x.shape[-1]))

    def of_weight(self, weight: Tensor, stored: Stored) -> Tensor:
        """W T: T is orthogonal, hence T^-T = T."""
        return self.apply(weight, stored)

    def undo(self, weight: Tensor, stored: Stored) -> Tensor:
        """W T^T."""
        return hadamard(weight, self.order(weight.shape[-1])) * self._signs(weight)

    def _signs(self, x: Tensor) -> Tensor:
        return signs(x.shape[-1], self.seed, x.dtype, x.device)


@dataclass(frozen=True)
class RotateResidual:
    """QuaRot's R1: the residual stream h becomes h T, T = D H / sqrt(n) as of `Hadamard`, folded into the weights.

    Embeddings become E T; the weights of norms go into what reads them, W diag(norm) T, and stay behind as ones; what
    writes to the stream becomes T^T W. A head that is tied to the embeddings becomes a weight of its own. Computed in
    float64 and rounded once.

    Args:
        seed: of the signs D.
    """

    seed: int = 0

    @torch.no_grad()
    def fold(self, model: Any) -> None:
        """Rotate `model`, which must be in evaluation mode.

        Raises:
            UnsupportedFold: a norm stands between what writes to the stream and the stream (Gemma 2 and 3), something
                other than linears reads it, or the rotated model would not be the same; nothing was changed.
        """
        ids = trial_ids(model)
        embedding, head, pairs, writers = _residual_stream(model, ids)
        rotation = Hadamard(seed=self.seed)
        rotation.check(head.in_features)
        offsets = {pair.name: offset(pair.source) or 0.0 for pair in pairs}
        expected = model(ids).logits
        with _rotated(rotation, embedding, pairs, writers, offsets):
            same = close(model(ids).logits, expected)
        if not same:
            raise UnsupportedFold(
                f"{type(model).__name__}: rotating its residual stream does not leave its outputs as they are; {_WAY_OUT}"
            )
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
        for pair in pairs:
            # in float64: 1 + w of Gemma's norms has more bits than w
            factor = pair.source.weight.double() + offsets[pair.name]
            for reader in pair.readers.values():
                _change(reader.weight, lambda W, factor=factor: rotation.apply(W * factor, {}))
            pair.source.weight.fill_(1 - offsets[pair.name])
        for writer in writers:
            _change(writer.weight.T, lambda W: rotation.apply(W, {}))
            if writer.bias is not None:
                _change(writer.bias[None], lambda b: rotation.apply(b, {}))
        _change(embedding.weight, lambda E: rotation.apply(E, {}))


@dataclass(frozen=True)
class RotateHeads:
    """QuaRot's R2: a Hadamard transform of each head's values, folded into the value and output projections.

    The values of all heads turn alike, so heads may share values. Where head_dim has no Hadamard matrix, blocks of the
    largest power of two turn.
    """

    @torch.no_grad()
    def fold(self, model: Any) -> None:
        """Rotate the heads of `model`, which must be in evaluation mode.

        Raises:
            UnsupportedFold: in a block, no linear's output reaches another one as heads' values do; nothing was changed.
        """
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        order = _order(head_dim)
        name, blocks = find_blocks(model)
        (inputs,) = block_inputs(model, blocks, [{"input_ids": trial_ids(model)}])
        found = []
        for index, block in enumerate(blocks):
            run = functools.partial(inputs.run, index, block)
            pairs = [pair for pair in find_pairs(block, run, linears(block)) if _keeps_heads(pair, order, run)]
            if not pairs:
                raise UnsupportedFold(
                    f"{name}.{index} has no two linears for the values and outputs of heads of {head_dim}; {_WAY_OUT}"
                )
            found += pairs
        for pair in found:
            (output,) = pair.readers.values()
            _change(pair.source.weight.T, lambda W: hadamard(W, order))
            if pair.source.bias is not None:
                _change(pair.source.bias[None], lambda b: hadamard(b, order))
            _change(output.weight, lambda W: hadamard(W, order))


@functools.lru_cache(maxsize=64)
def signs(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """n signs, +1 or -1. Bits of SHAKE-256: a checkpoint stores the seed only, and random generators may change."""
    with torch.inference_mode(False):
        bits = torch.tensor(list(hashlib.shake_256(f"{seed}".encode()).digest(n))) % 2
        return (1 - 2 * bits).to(device, dtype)


def _order(n: int) -> int:
    """n, or the largest power of two in it.

    Checkpoints do not hold it: where `is_order` learns a new order, inputs of that width that were rotated in blocks of
    n & -n are to be quantised again.
    """
    return n if is_order(n) else n & -n


class _ResidualStream(NamedTuple):
    embedding: nn.Embedding
    head: nn.Linear
    pairs: list[Pair]  # norms, and what reads them; the last one's is the head
    writers: list[nn.Linear]


def _residual_stream(model: Any, ids: Tensor) -> _ResidualStream:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UnsupportedFold(f"{type(model).__name__} has no linear head that reads the residual stream; {_WAY_OUT}")
    name, blocks = find_blocks(model)
    (inputs,) = block_inputs(model, blocks, [{"input_ids": ids}])
    pairs: list[Pair] = []
    writers: list[nn.Linear] = []
    for index, block in enumerate(blocks):
        of_stream = {key: norm for key, norm in norms(block).items() if len(norm.weight) == head.in_features}  # pyright: ignore[reportArgumentType]
        found = find_pairs(block, functools.partial(inputs.run, index, block), of_stream)
        if unread := of_stream.keys() - {pair.name for pair in found}:
            raise UnsupportedFold(
                f"{name}.{index}.{min(unread)} is a post-norm on the branch output, which no rotation passes; {_WAY_OUT}"
            )
        readers = [reader for pair in found for reader in pair.readers.values()]
        pairs += [pair._replace(name=f"{name}.{index}.{pair.name}") for pair in found]
        writers += [
            linear
            for linear in linears(block).values()
            if linear.out_features == head.in_features and not any(linear is reader for reader in readers)
        ]
    outside = {key: norm for key, norm in norms(model).items() if not key.startswith(f"{name}.")}
    last = [pair for pair in find_pairs(model, lambda: model(ids).logits, outside) if head in pair.readers.values()]
    if not last:
        raise UnsupportedFold(f"{type(model).__name__} has no norm that only its head reads; {_WAY_OUT}")
    pairs += last
    for pair in pairs:
        if pair.others:
            raise UnsupportedFold(f"{next(iter(pair.others))} reads the residual stream but is no linear's; {_WAY_OUT}")
        if getattr(pair.source, "bias", None) is not None:
            raise UnsupportedFold(f"{pair.name} has a bias: it is no RMSNorm, which alone rotations pass; {_WAY_OUT}")
    return _ResidualStream(embedding, head, pairs, writers)


@contextmanager
def _rotated(
    rotation: Hadamard,
    embedding: nn.Module,
    pairs: list[Pair],
    writers: list[nn.Linear],
    offsets: Mapping[str, float],
) -> Iterator[None]:
    """Inside, the model computes with a rotated stream, its large weights being as they were."""

    def turn(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return rotation.apply(output, {})

    def turn_back(factor: Tensor) -> Callable[..., tuple[Tensor]]:
        return lambda module, arguments: (rotation.undo(arguments[0], {}) * factor,)

    weights = {pair.source: (pair.source.weight.data, offsets[pair.name]) for pair in pairs}
    handles = [module.register_forward_hook(turn) for module in (embedding, *writers)]
    for pair in pairs:
        hook = turn_back(pair.source.weight.data + offsets[pair.name])
        handles += [reader.register_forward_pre_hook(hook) for reader in pair.readers.values()]
    try:
        for norm, (weight, one) in weights.items():
            norm.weight.data = torch.full_like(weight, 1 - one)
        yield
    finally:
        for norm, (weight, _) in weights.items():
            norm.weight.data = weight
        for handle in handles:
            handle.remove()


def _keeps_heads(pair: Pair, order: int, run: Callable[[], Tensor]) -> bool:
    """Whether blocks of `order` channels may turn between the pair's source and its one reader: as attention lets them."""
    if len(pair.readers) != 1 or pair.others or pair.channels % order or order == 1:
        return False
    (reader,) = pair.readers.values()
    expected = run()
    handles = [
        pair.source.register_forward_hook(lambda module, arguments, output: hadamard(output, order)),
        reader.register_forward_pre_hook(lambda module, arguments: (hadamard(arguments[0], order),)),
    ]
    try:
        return close(run(), expected)
    finally:
        for handle in handles:
            handle.remove()


def close(output: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding: a wrong fold is off by about as much as the outputs themselves."""
    return bool((output - expected).norm() <= torch.finfo(expected.dtype).eps ** 0.5 * expected.norm())


def trial_ids(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)


def _change(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """`weight` (rows, columns) becomes what `change` makes of its rows, in float64, a few thousand at a time."""
    for rows in weight.split(4096):
        rows.copy_(change(rows.double()))
