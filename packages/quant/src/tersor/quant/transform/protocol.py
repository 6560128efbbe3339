"""What the walk asks of a transform: a change of the weights that leaves the model's function as it is."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from tersor.quant.calibration import BlockInputs
from tersor.quant.grid.protocol import Buffer, Grid, Stored


class UnsupportedFold(NotImplementedError):
    """The model has a part that a change of its weights cannot be folded through."""


@runtime_checkable
class ModelTransform(Protocol):
    """Changes a whole model before anything is quantised, without data: a rotation of the residual stream, say."""

    def fold(self, model: Any) -> None:
        """Change the weights of `model` in place; its outputs stay the same, up to rounding.

        Raises:
            UnsupportedFold: the model has a part that the change cannot be folded through; nothing was changed.
        """
        ...


@runtime_checkable
class CalibratedTransform(Protocol):
    """Changes a whole model before anything is quantised, as the calibration data tells: an order of channels, say."""

    def fold_calibrated(self, model: Any, data: Sequence[Mapping[str, Tensor]]) -> None:
        """As `ModelTransform.fold`; `data` are batches of inputs of the model."""
        ...


@runtime_checkable
class BlockTransform(Protocol):
    """Changes one block once its inputs are known, before its layers are quantised: scales of channels, say."""

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        """Raises UnsupportedFold if `block` has nothing that the change can be folded into; arguments as of `fold_block`.

        Called for all blocks before any of them is changed, so the hidden states of `inputs` are those of the first.
        """
        ...

    def fold_block(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> None:
        """Change the weights of `block` in place; what it makes of `inputs` stays the same, up to rounding.

        Args:
            inputs: what the block is called with: `each.run(index, block)` is its output, (batch, seq, hidden).
            grids: what its linears will become; others stay as they are.
        """
        ...


@runtime_checkable
class TaughtTransform(Protocol):
    """Changes one block, as a `BlockTransform` does, but is also told what the original model computes there."""

    def check_block(self, block: nn.Module, inputs: Sequence[BlockInputs], index: int) -> None:
        """As of `BlockTransform`."""
        ...

    def fold_taught(
        self,
        block: nn.Module,
        original: nn.Module,
        inputs: Sequence[BlockInputs],
        dense: Sequence[BlockInputs],
        index: int,
        grids: Mapping[nn.Linear, Grid],
    ) -> None:
        """Change the weights of `block` in place. Called without gradients: enable them.

        Args:
            original: the block as it was before anything of the recipe was done to it.
            inputs: what the quantised blocks before it put out: `each.run(index, block)`, (batch, seq, hidden).
            dense: what the original blocks before it put out: `each.run(index, original)` is what the model computed.
            grids: what its linears will become; others stay as they are.
        """
        ...


@runtime_checkable
class RangeTransform(Protocol):
    """Chooses, once a block's inputs are known and all else is folded, how much of its weights' range a grid spans."""

    def ranges(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> dict[nn.Linear, Tensor]:
        """A share of each row's range, (out, 1), for linears of `block` with an `IntGrid`; without one: all of it.

        Args:
            inputs: what the block is called with: `each.run(index, block)` is its output, (batch, seq, hidden).
            grids: what its linears will become.
        """
        ...


@runtime_checkable
class SearchedTransform(Protocol):
    """Block transforms whose settings are found by trying them on the whole model, before anything is changed."""

    def choose(
        self, blocks: Sequence[nn.Module], inputs: Sequence[BlockInputs], grids: Mapping[nn.Linear, Grid]
    ) -> tuple[BlockTransform, ...]:
        """What stands in its place; nothing if nothing helps. `blocks` and `inputs` stay as they are.

        Args:
            grids: what the blocks' linears will become; others stay as they are.
        """
        ...


@runtime_checkable
class OnlineTransform(Protocol):
    """An invertible T of a layer's input, applied at run time: y = x W^T = (x T) (W T^-T)^T. Settings and buffers."""

    @property
    def needs_hessian(self) -> bool: ...

    @property
    def layers(self) -> tuple[str, ...]:
        """The linears that it is applied to, by the ends of their names as in `keep`; (): all."""
        ...

    def check(self, in_features: int) -> None:
        """Raises ValueError, with a way out, if there is no such transform of this width."""
        ...

    def layout(self, in_features: int) -> dict[str, Buffer]:
        """What is stored besides the settings; nothing where a seed does."""
        ...

    def fit(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> dict[str, Tensor]:
        """The buffers, for a weight (out, in) with second moments of its inputs (in, in), or none."""
        ...

    def apply(self, x: Tensor, stored: Stored) -> Tensor:
        """x T, (..., in), in the dtype of x."""
        ...

    def of_weight(self, weight: Tensor, stored: Stored) -> Tensor:
        """W T^-T (out, in): what is quantised in place of W."""
        ...

    def undo(self, weight: Tensor, stored: Stored) -> Tensor:
        """W again."""
        ...
