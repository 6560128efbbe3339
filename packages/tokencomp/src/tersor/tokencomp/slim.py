"""The walk: replace each layer's forward by its two halves with a reduction between them; give all back on detach."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from tersor.tokencomp.recipe import Attended, Recipe
from tersor.tokencomp.site import Layer, Tower, find_tower
from tersor.tokencomp.state import TokenState
from tersor.tokencomp.stats import LayerCount, Stats


def slim(model: nn.Module, recipe: Recipe) -> "Session":
    """Let `model` work on fewer tokens until the session ends.

    The model stays the object that it was: same weights, same keys, same call, in evaluation as in training (gradients
    flow through merged tokens). What comes back per token (`last_hidden_state`) has the tokens that are left;
    `session.state.unmerge` puts them back on their places.

    Args:
        model: see `site.SUPPORTED`; a model that holds one such tower (ViTForImageClassification, CLIPModel) will do.
        recipe: what `recipes` offers, or pieces of your own.

    Raises:
        UnsupportedModel: no such tower in it.

    Warns:
        UserWarning: nothing was removed, or less than the schedule asked for.

    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tersor.tokencomp import recipes, slim
    >>> _ = torch.manual_seed(0)
    >>> config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    ...                    image_size=32, patch_size=4)
    >>> model = ViTModel(config).eval()
    >>> with slim(model, recipes.tome(r=8)) as session, torch.no_grad():
    ...     out = model(torch.randn(2, 3, 32, 32))
    >>> session.stats.tokens, out.last_hidden_state.shape
    ((65, 57, 49, 41, 33), torch.Size([2, 33, 32]))
    >>> session.state.unmerge(out.last_hidden_state).shape
    torch.Size([2, 65, 32])
    """
    return Session(model, recipe)


class Session:
    """A slimmed model: ends with its `with` block or by `detach()`.

    Attributes:
        stats: counts of tokens and multiply-adds, see `Stats`.
        state: what the tokens of the latest forward stand for; None before the first one.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stats = Stats()
        self.state: TokenState | None = None
        self._tower: Tower = find_tower(model)
        self._attached = ExitStack()
        self._plan: tuple[int, ...] = ()
        self._told: set[str] = set()
        for i, layer in enumerate(self._tower.layers):
            if "forward" in vars(layer.module):
                self._attached.close()
                raise ValueError(
                    f"layer {i}: the forward of {type(layer.module).__name__} is replaced already "
                    "(another slim session, or offloading hooks); detach that first"
                )
            forward = SlimLayer(self, i, layer).forward
            layer.module.forward = forward
            self._attached.callback(_release, i, layer.module, forward)
        self._tower.attach_pooling(self._attached, self._latest)

    def detach(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        self._attached.close()
        if not self.stats.images:
            self._tell("detached before any forward: nothing was merged")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self.detach()
        else:  # the error itself says what happened
            self._attached.close()

    def _latest(self) -> tuple[TokenState, Tensor | None]:
        assert self.state is not None  # pooling comes after the layers
        return self.state, self.recipe.reducer.attention_bias(self.state)

    def _start(self, x: Tensor) -> TokenState:
        for layer in self._tower.layers:
            layer.check()
        self.stats.layers = []
        self.stats.images += len(x)
        self._plan = self.recipe.schedule.plan(len(self._tower.layers), x.shape[1])
        return TokenState.start(x, self._tower.num_protected)

    def _run(self, i: int, layer: Layer, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Layer `i`: attention, reduction, MLP."""
        state = self._start(x) if i == 0 else self.state
        if state is None or x.shape[:2] != state.size.shape:
            raise RuntimeError(f"layer {i} got {tuple(x.shape)} tokens that layer {i - 1} did not give it")
        reducer, asked = self.recipe.reducer, self._plan[i]
        r = min(asked, reducer.limit(state.num_tokens, state.num_protected))

        x, key = layer.attend(x, reducer.attention_bias(state), args, kwargs)
        cost = 0
        if r:
            scores = self.recipe.scorer.score(Attended(i, x, key))
            cost = reducer.macs(state.num_tokens, state.num_protected, scores.shape[-1])
            x, reduced = reducer.reduce(x, state, scores, r)
        else:
            reduced = state
        n0, n, m = state.num_original, state.num_tokens, reduced.num_tokens
        self.stats.add(len(x), LayerCount(n, asked, n - m, layer.macs(n, m) + cost, layer.macs(n0, n0)))
        self.state = reduced
        if i == len(self._tower.layers) - 1:
            self._report()
        return layer.feed(x)

    def _report(self) -> None:
        if self.state is not None and self.state.num_tokens == self.state.num_original:
            self._tell(f"no token was removed from {self.state.num_tokens} by {self.recipe.schedule}")
        elif self.stats.clamped:
            i = self.stats.clamped[0]
            count = self.stats.layers[i]
            self._tell(
                f"{self.recipe.schedule} asks for {count.asked} of {count.tokens_in} tokens in layer {i}, "
                f"{count.removed} can go; lower r, or see stats.layers for what was removed"
            )

    def _tell(self, message: str) -> None:
        """Warn, once per session and message."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=3)


def _release(i: int, module: nn.Module, forward: Callable) -> None:
    if vars(module).get("forward") != forward:
        raise RuntimeError(f"layer {i}: something replaced the slimmed forward and is still there; detach it first")
    del module.forward


@dataclass(frozen=True)
class SlimLayer:
    """What stands in for a layer's forward.

    An object, no closure: so a deep copy of the model runs on its own weights; it stays slim for good.
    """

    session: Session
    i: int
    layer: Layer

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.session._run(self.i, self.layer, x, args, kwargs)
