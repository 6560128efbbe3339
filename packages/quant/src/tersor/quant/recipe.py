"""What a quantiser is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tersor.quant.activation import Activation, CalibratedActivation
from tersor.quant.compensation import Compensation
from tersor.quant.grid import Grid, IntGrid, SignLowRankStack
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN, CoordinateDescent, LearnedRounding, Solver, SpQR
from tersor.quant.transform import (
    BlockTransform,
    CalibratedTransform,
    ModelTransform,
    OnlineTransform,
    RangeTransform,
    SearchedTransform,
    TaughtTransform,
)
from tersor.quant.tuning import (
    PV,
    BlockReconstruction,
    BlockTuning,
    LearnedClip,
    LearnedStep,
    ModelTuning,
    StraightThrough,
)

if TYPE_CHECKING:
    from tersor.quant.allocation import MixedGrids


Transform = (
    ModelTransform
    | CalibratedTransform
    | BlockTransform
    | TaughtTransform
    | RangeTransform
    | SearchedTransform
    | OnlineTransform
)


@dataclass(frozen=True)
class Recipe:
    """A quantiser for `quantize`.

    Args:
        grid: which numbers a weight may become, and what they cost.
        solver: which of them it does become.
        transforms: what is done to the weights before, in this order; one of them may be an `OnlineTransform`.
        activation: how the inputs of layers are rounded at run time; None: not at all.
        compensation: what is stored beside each weight to make up for its error; None: nothing.
        tuning: what is learnt by gradients once a block, or the model, is quantised, in this order.
        allocation: finds a grid for each layer, so that all cost together what `grid` would; None: all have `grid`.
        pad: where groups (or blocks, or the transform) do not divide a layer's inputs, the fewest zeros are added to
            them, and as many columns of zeros are stored, that make it suit. Otherwise such a layer is an error.
    """

    grid: Grid
    solver: Solver = RTN()
    transforms: tuple[Transform, ...] = ()
    activation: Activation | None = None
    compensation: Compensation | None = None
    tuning: tuple[BlockTuning | ModelTuning, ...] = ()
    allocation: "MixedGrids | None" = None
    pad: bool = False

    def __post_init__(self) -> None:
        first = self.solver
        while isinstance(first, CoordinateDescent | LearnedRounding):
            first = first.start
        if isinstance(first, SpQR) and self.compensation is None:
            raise ValueError("SpQR leaves outliers to a compensation: add compensation=SparseOutliers()")
        if len(online := [t for t in self.transforms if isinstance(t, OnlineTransform)]) > 1:
            raise ValueError(f"a layer takes one transform at run time, got {online}")
        if online and isinstance(self.activation, CalibratedActivation):
            raise ValueError(
                f"{self.activation} learns from inputs before {online[0]} has changed them: use IntActivation, or fold"
            )
        of_levels = RangeTransform | LearnedStep | LearnedClip | BlockReconstruction
        for piece in (*self.transforms, *self.tuning):
            if isinstance(piece, of_levels) and not isinstance(self.grid, IntGrid):
                raise TypeError(
                    f"{type(piece).__name__} needs evenly spaced levels, which {self.grid} does not have: use an IntGrid"
                )
            if isinstance(piece, PV | StraightThrough) and isinstance(self.grid, SignLowRankStack):
                raise TypeError(
                    f"{type(piece).__name__} moves codes of neighbours in a row, which those of {self.grid} are not"
                )

        rounding = BlockTransform | TaughtTransform | RangeTransform | SearchedTransform
        if self.pad and any(isinstance(t, rounding) for t in self.transforms):
            names = ", ".join(type(t).__name__ for t in self.transforms if isinstance(t, rounding))
            raise ValueError(f"{names} would round weights before they are padded: use a group size that divides")

    @property
    def scheme(self) -> Scheme:
        """How this recipe stores a layer."""
        online = next((t for t in self.transforms if isinstance(t, OnlineTransform)), None)
        return Scheme(self.grid, online, self.activation, self.compensation)

    @property
    def needs_hessian(self) -> bool:
        """Whether a layer needs the second moments, or the ranges, of its inputs."""
        pieces = (self.solver, self.compensation, self.scheme.transform)
        calibrated = isinstance(self.activation, CalibratedActivation)
        return calibrated or any(piece.needs_hessian for piece in pieces if piece is not None)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        learning = CalibratedTransform | BlockTransform | TaughtTransform | RangeTransform | SearchedTransform
        learnt = any(isinstance(t, learning) for t in self.transforms)
        return self.needs_hessian or learnt or bool(self.tuning)
