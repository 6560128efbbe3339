"""Session: what a cache knows while it is attached. Its state, its counts, and what happens at a model call."""

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.diffcache.clock import CallReader, Clock, Named, Signals, Tick
from tersor.diffcache.granularity.find import is_compiled
from tersor.diffcache.granularity.site import Site, structure
from tersor.diffcache.history import History
from tersor.diffcache.recipe import Recipe


@dataclass(frozen=True)
class Stats:
    """What was counted since the cache was attached.

    An evaluation is one call of a site (an attention or MLP module, a block: the granularity says). The
    multiply-accumulates are those of the linear layers inside the sites, counted from the shapes that went through;
    attention's products of queries, keys and values, and linears inside compiled sites, are not in them.

    Args:
        calls: calls of the model.
        runs: trajectories that the clock saw.
        executed: evaluations that ran.
        skipped: evaluations that were predicted instead.
        macs_executed: multiply-accumulates that ran in the sites' linears.
        macs_skipped: multiply-accumulates that did not.
        peak_nbytes: most bytes that the cache held after a call.
        by_site: (executed, skipped) of each site.
    """

    calls: int
    runs: int
    executed: int
    skipped: int
    macs_executed: int
    macs_skipped: int
    peak_nbytes: int
    by_site: Mapping[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """Fraction of the evaluations that ran: 1.0 means that nothing was saved."""
        total = self.executed + self.skipped
        return self.executed / total if total else 1.0

    def __str__(self) -> str:
        return (
            f"{self.executed} of {self.executed + self.skipped} evaluations ran ({self.ratio:.0%}) in {self.calls} "
            f"calls of {self.runs} trajectories; at most {self.peak_nbytes / 2**20:.1f} MiB held"
        )


class Session:
    """One model, one cache. Made by `cached`; lives as long as the `with`."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        # blocks that share a module share its site
        self.sites: list[Site] = list({site.module: site for site in recipe.granularity.sites(model)}.values())
        self._model = model
        self._clock = Clock()
        self._read = CallReader(model)
        self._named: list[Named] = []  # the innermost is last
        self._store: dict[tuple[str, str, int], History] = {}
        self._last_computed: dict[str, int] = {}
        # of the call in progress
        self._one_call = threading.Lock()
        self._tick: Tick | None = None
        self._compute = True
        self._occurrences: dict[str, int] = defaultdict(int)
        # counts
        self._calls = 0
        self._decided_to_skip = False
        self._macs = [0, 0]
        self._counts: dict[str, list[int]] = {site.name: [0, 0] for site in self.sites}
        self._peak_nbytes = 0
        self._trouble: list[str] = []

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now: features, and the conditionings by which it tells contexts apart."""
        return sum(history.nbytes for history in self._store.values()) + self._clock.nbytes

    @property
    def stats(self) -> Stats:
        return Stats(
            calls=self._calls,
            runs=self._clock.run + 1,
            executed=sum(count[0] for count in self._counts.values()),
            skipped=sum(count[1] for count in self._counts.values()),
            macs_executed=self._macs[0],
            macs_skipped=self._macs[1],
            peak_nbytes=self._peak_nbytes,
            by_site={name: (count[0], count[1]) for name, count in self._counts.items()},
        )

    def reset(self) -> None:
        """Forget all features: the next call begins a new trajectory. Counts stay."""
        self._clock.restart()
        self._forget()

    @contextmanager
    def step(self, index: int, context: str = "cond") -> Iterator[None]:
        """Say which step and which guidance branch the calls inside belong to, where the call itself does not tell."""
        with self.named(Named(context, index)):
            yield

    @contextmanager
    def named(self, named: Named) -> Iterator[None]:
        self._named.append(named)
        try:
            yield
        finally:
            self._named.pop()

    def call_model(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One call of the attached model."""
        if not self._one_call.acquire(blocking=False):
            raise RuntimeError(
                f"{type(self._model).__name__} was called while a call of it was running: a cache serves one call at a "
                "time. Give each thread a model and a session of its own"
            )
        try:
            self._calls += 1
            self._begin(args, kwargs)
            output = forward(*args, **kwargs)
            if self._tick is not None and self._compute:
                self._last_computed[self._tick.context] = self._tick.step
            self._peak_nbytes = max(self._peak_nbytes, self.nbytes)
            return output
        except BaseException:
            # half of the sites are at this step, half at an older one
            self.reset()
            raise
        finally:
            self._tick = None
            self._occurrences.clear()
            self._one_call.release()

    def call_site(self, site: Site, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One evaluation of a site: computed and kept, or predicted."""
        if not self._one_call.locked():
            return forward(*args, **kwargs)  # not from the model: somebody calls a block by itself
        if self._tick is None:
            self._counts[site.name][0] += 1
            return forward(*args, **kwargs)
        # a module may run more than once in a call (chunked feed-forward, shared blocks): each time is its own
        key = (self._tick.context, site.name, self._occurrences[site.name])
        self._occurrences[site.name] += 1
        history = self._store.get(key)
        signature = _signature(args, kwargs)
        if history is not None and history.signature != signature:
            history = None
        if history is not None and not self._compute:
            self._count(site, 1, history.macs)
            features = history.predict(self.recipe.predictor, self._tick.step)
            return site.port.give(args, kwargs, features, history.like)
        if history is None:
            with _counting_macs(site.module) as macs:
                output = forward(*args, **kwargs)
            if _is_linear(site.module):  # a hook on the site itself would come too late for this call
                macs.append(_macs(site.module, output))
            history = self._store[key] = History(signature, structure(output), sum(macs))
        else:
            output = forward(*args, **kwargs)
        self._count(site, 0, history.macs)
        try:
            history.push(self._tick.step, site.port.take(args, kwargs, output), self.recipe.predictor.history)
        except TypeError as error:
            raise TypeError(f"{site.name} ({type(site.module).__name__}): {error}") from None
        return output

    def close(self) -> None:
        """Free the features. Counts stay readable."""
        self.reset()

    def why_nothing_was_reused(self) -> str | None:
        """The reason why every evaluation ran; None if some did not."""
        if self.stats.skipped:
            return None
        if not self._calls:
            return "the model was not called"
        if self._trouble:
            return "; ".join(self._trouble)
        if self._calls <= self._clock.run + 1:
            return "every call was the first step of a trajectory; attach around the loop, not inside it"
        if self._decided_to_skip:
            return "the shapes, dtypes or contexts changed at each step"
        return f"{self.recipe.trigger} computed every step"

    def _begin(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Read the clock and decide whether this call computes."""
        self._tick, self._compute = None, True
        if torch.is_grad_enabled() or self._model.training:
            state = "gradients are on" if torch.is_grad_enabled() else "the model is in training mode"
            way_out = "torch.no_grad()" if torch.is_grad_enabled() else "model.eval()"
            self._complain(f"{state}, and a reused feature has no gradient; use {way_out}")
            self.reset()
            return
        run = self._clock.run
        tick = self._clock.tick(self._read(args, kwargs), self._named[-1] if self._named else None)
        if tick is None:
            self._complain(str(self._clock.trouble))
            return
        if tick.run != run:
            self._forget()
        self._tick = tick
        last = self._last_computed.get(tick.context)
        self._compute = last is None or self.recipe.trigger.decide(Signals(tick, last))
        self._decided_to_skip |= not self._compute

    def _forget(self) -> None:
        self._store.clear()
        self._last_computed.clear()

    def _complain(self, trouble: str) -> None:
        """Warn once that calls are computed in full."""
        if trouble not in self._trouble:
            self._trouble.append(trouble)
            warnings.warn(f"{type(self._model).__name__} is computed without cache: {trouble}", RuntimeWarning, 2)

    def _count(self, site: Site, skipped: int, macs: int) -> None:
        self._counts[site.name][skipped] += 1
        self._macs[skipped] += macs


def _signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tuple((t.shape, t.dtype, t.device) for t in tensors)


@contextmanager
def _counting_macs(module: nn.Module) -> Iterator[list[int]]:
    """Collects the multiply-accumulates of the linear layers below `module`, while its forward runs."""
    macs: list[int] = []
    below = [m for m in module.modules() if m is not module]
    # a hook would make a compiled module compile again
    linears = [] if any(map(is_compiled, [module, *below])) else filter(_is_linear, below)
    handles = [m.register_forward_hook(lambda m, _, output: macs.append(_macs(m, output))) for m in linears]
    try:
        yield macs
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "weight_shape")


def _macs(linear: Any, output: Tensor) -> int:
    # a quantised linear says its shape, (out, in)
    return output.numel() * (linear.weight_shape[1] if hasattr(linear, "weight_shape") else linear.in_features)
