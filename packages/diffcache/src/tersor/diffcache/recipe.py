"""Recipe: what is replaced (granularity), with what (predictor), and when it is computed instead (trigger)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from tersor.diffcache.clock import Signals
from tersor.diffcache.granularity import SubModules
from tersor.diffcache.granularity.site import Site
from tersor.diffcache.predictor import Reuse
from tersor.diffcache.trigger import Interval


@runtime_checkable
class Granularity(Protocol):
    """*What* is replaced: which modules of a model are sites, and how a prediction re-enters at each."""

    def sites(self, model: nn.Module) -> list[Site]: ...


@runtime_checkable
class Predictor(Protocol):
    """*With what*: F_hat(t) = sum_j w_j F(t_j), t_0 the newest computed step; `history` features are kept."""

    history: ClassVar[int]

    def weights(self, times: Sequence[float], t: float) -> list[float]: ...


@runtime_checkable
class Trigger(Protocol):
    """*When*: True computes this step, False predicts it. Never asked before a context's first computed step."""

    def decide(self, signals: Signals) -> bool: ...


@dataclass(frozen=True)
class Recipe:
    """A feature cache: one piece per axis.

    Args:
        granularity: the modules whose output is replaced.
        predictor: what stands in for an output that is not computed.
        trigger: the steps that are computed.
    """

    granularity: Granularity = field(default_factory=SubModules)
    predictor: Predictor = field(default_factory=Reuse)
    trigger: Trigger = field(default_factory=Interval)

    def __post_init__(self) -> None:
        for axis, protocol, method in (
            ("granularity", Granularity, "sites(model)"),
            ("predictor", Predictor, "weights(times, t) and a `history`"),
            ("trigger", Trigger, "decide(signals)"),
        ):
            piece = getattr(self, axis)
            if isinstance(piece, type) or not isinstance(piece, protocol):
                raise TypeError(f"{axis} must be an object with {method}, got {piece!r}; see tersor.diffcache.{axis}")
