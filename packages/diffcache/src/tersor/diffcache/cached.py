"""cached: attach a feature cache to a transformer for the length of a `with`."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from tersor.diffcache.clock import Named
from tersor.diffcache.recipe import Recipe
from tersor.diffcache.session import Session

_ABSENT = object()


@contextmanager
def cached(transformer: nn.Module, recipe: Recipe) -> Iterator[Session]:
    """Attach `recipe`'s cache to `transformer` inside the `with`; afterwards the model is exactly as it was.

    The loop or pipeline around the model stays as it is: the steps are told from the calls (see `clock.Clock`). Run it
    under `torch.no_grad()` or `torch.inference_mode()` and in eval mode; with gradients every call is computed in full,
    with a warning. A `with` at whose end nothing was ever reused warns, too, and says why.

    >>> import torch
    >>> from tersor.diffcache import cached, recipes
    >>> from tersor.diffcache.testing import ToyDiT, euler
    >>> model, noise, labels = ToyDiT().eval(), torch.randn(1, 1, 8, 8), torch.tensor([2])
    >>> with torch.no_grad(), cached(model, recipes.fora(interval=3)) as session:
    ...     image = euler(model, noise, labels, steps=12)
    >>> session.stats.executed, session.stats.skipped  # 2 blocks x (attention, MLP), 4 of 12 steps
    (16, 32)

    Raises:
        UnsupportedModel: the granularity finds nothing to replace in this model.
        RuntimeError: a cache is attached already.
    """
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"cached takes the denoising model, an nn.Module, got {type(transformer).__name__}; "
            "of a pipeline pass `pipeline.transformer`"
        )
    _refuse_second_cache(transformer)
    session = Session(transformer, recipe)
    for site in session.sites:
        _refuse_second_cache(site.module, site.name)
    patches: list[_Patch] = []
    try:
        body = functools.partial(_call_model, session)
        patches.append(_Patch(transformer, "forward", body))
        for site in session.sites:
            patches.append(_Patch(site.module, "forward", functools.partial(_call_site, session, site)))
        if hasattr(transformer, "cache_context"):  # diffusers pipelines name the guidance branch there
            patches.append(_Patch(transformer, "cache_context", functools.partial(_cache_context, session)))
        yield session
        if reason := session.why_nothing_was_reused():
            # 3: past this line and contextlib's, to the user's `with`
            warnings.warn(f"the cache on {type(transformer).__name__} reused nothing: {reason}", RuntimeWarning, 3)
    finally:
        session.close()
        left = [patch.name for patch in reversed(patches) if not patch.undo()]
        if left:
            warnings.warn(
                f"{', '.join(left)}: replaced by something else while a cache was attached. The replacement stays, the "
                "cache inside it now does nothing; remove hooks in the reverse order",
                RuntimeWarning,
                3,
            )


def _call_model(session: Session, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return session.call_model(forward, args, kwargs)


def _call_site(session: Session, site: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return session.call_site(site, forward, args, kwargs)


@contextmanager
def _cache_context(session: Session, original: Callable[..., Any], name: str, **fields: Any) -> Iterator[None]:
    with original(name, **fields), session.named(Named(name, fields.get("step_index"))):
        yield


class _Patch:
    """An attribute of one module instance, replaced by `body(original, ...)` until `undo`. The class is untouched."""

    def __init__(self, module: nn.Module, attribute: str, body: Callable[..., Any]) -> None:
        self.name = f"{type(module).__name__}.{attribute}"
        self._module, self._attribute = module, attribute
        self._own = module.__dict__.get(attribute, _ABSENT)
        self._ours = _Attached(getattr(module, attribute), body)
        # not setattr: a compiled module hands attributes on to the module that it wraps
        module.__dict__[attribute] = self._ours

    def undo(self) -> bool:
        """Put the original back; False if somebody else's replacement stands there now."""
        self._ours.body = None
        if self._module.__dict__.get(self._attribute) is not self._ours:
            return False
        if self._own is _ABSENT:
            del self._module.__dict__[self._attribute]
        else:
            self._module.__dict__[self._attribute] = self._own
        return True


class _Attached:
    """Stands where `original` stood; signature and docs are the original's."""

    def __init__(self, original: Callable[..., Any], body: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original = original
        self.body: Callable[..., Any] | None = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self.body is None else self.body(self._original, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # a copy would go on calling the model that it was copied from
        raise RuntimeError("a model with a cache attached cannot be copied or pickled; leave `with cached(...)` first")


def _refuse_second_cache(module: nn.Module, name: str = "") -> None:
    where = f"{name} ({type(module).__name__})" if name else type(module).__name__
    if isinstance(module.__dict__.get("forward"), _Attached):
        raise RuntimeError(f"{where} has a cache attached already; leave its `with cached(...)` first")
    if getattr(module, "is_cache_enabled", False) is True:
        raise RuntimeError(f"{where} has a diffusers cache enabled; call disable_cache() first")
