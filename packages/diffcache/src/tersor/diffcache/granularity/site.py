"""A site: one module whose value may be replaced, and its port: what is kept of it and how that re-enters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Args = Sequence[Any]
Kwargs = Mapping[str, Any]


class Port(Protocol):
    """`take` keeps a computed output as feature tensors; `give` makes an output of predicted ones.

    What `take` returns is kept over many steps, so it must own its memory; what `give` returns may be written to by
    the model, so it must not be the kept tensors themselves.
    """

    def take(self, args: Args, kwargs: Kwargs, output: Any) -> list[Tensor | None]: ...

    def give(self, args: Args, kwargs: Kwargs, features: list[Tensor | None], like: Any) -> Any: ...


class Site(NamedTuple):
    name: str
    module: nn.Module
    port: Port


@dataclass(frozen=True)
class Output:
    """The feature is the output itself: a tensor, or a tuple of tensors and None."""

    def take(self, args: Args, kwargs: Kwargs, output: Any) -> list[Tensor | None]:
        return [None if leaf is None else leaf.detach().clone() for leaf in leaves(output)]

    def give(self, args: Args, kwargs: Kwargs, features: list[Tensor | None], like: Any) -> Any:
        return rebuild([None if feature is None else feature.clone() for feature in features], like)


@dataclass(frozen=True)
class Feeder:
    """A module that only feeds a later site, which is predicted whenever this one is: nothing of it is needed.

    Its stand-in is NaN in the right shape, one number in memory: should anything but that site read it, it shows.
    """

    def take(self, args: Args, kwargs: Kwargs, output: Any) -> list[Tensor | None]:
        return [None if leaf is None else leaf.new_full((), torch.nan).expand(leaf.shape) for leaf in leaves(output)]

    def give(self, args: Args, kwargs: Kwargs, features: list[Tensor | None], like: Any) -> Any:
        return rebuild(features, like)


@dataclass(frozen=True)
class Residual:
    """The feature is out - in of each stream, so that the current input flows through: out_hat = in + feature.

    Args:
        hidden: position of the hidden states in the tuple that the block returns (0 if it returns a tensor).
        text: position of the text stream; None if the block does not return one.
    """

    hidden: int = 0
    text: int | None = None

    def take(self, args: Args, kwargs: Kwargs, output: Any) -> list[Tensor | None]:
        inputs = self._inputs(args, kwargs, len(leaves(output)))
        return [
            None if leaf is None else leaf.detach() - inputs[i]  # None: the last block of SD3 drops the text
            for i, leaf in enumerate(leaves(output))
        ]

    def give(self, args: Args, kwargs: Kwargs, features: list[Tensor | None], like: Any) -> Any:
        inputs = self._inputs(args, kwargs, len(features))
        return rebuild([None if feature is None else inputs[i] + feature for i, feature in enumerate(features)], like)

    def _inputs(self, args: Args, kwargs: Kwargs, n_outputs: int) -> list[Tensor]:
        positions = {self.hidden} if self.text is None else {self.hidden, self.text}
        if positions != set(range(n_outputs)):
            raise TypeError(
                f"the block returned {n_outputs} values, but hidden = {self.hidden} and text = {self.text} name "
                f"{len(positions)}; say where they are with Blocks(hidden=..., text=...)"
            )
        inputs = [args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))]
        if self.text is not None:
            inputs.append(args[1] if len(args) > 1 else kwargs["encoder_hidden_states"])
        return inputs if self.hidden == 0 else inputs[::-1]


def leaves(output: Any) -> list[Tensor | None]:
    """The tensors of an output, in order."""
    values = output if isinstance(output, tuple | list) else [output]
    for value in values:
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"a cached module must return a tensor or a tuple of tensors, got {type(output).__name__} with "
                f"{type(value).__name__}; leave it out by naming the others in the granularity"
            )
    return list(values)


def rebuild(values: list[Any], like: Any) -> Any:
    """`values` in the structure that `structure` described."""
    return values[0] if like is None else like(values)


def structure(output: Any) -> Any:
    """How to make an output of its leaves: None for a lone tensor, else a function of the list."""
    if not isinstance(output, tuple | list):
        return None
    # a named tuple takes its fields one by one
    return getattr(type(output), "_make", type(output))
