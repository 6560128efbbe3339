"""What `slim` needs to know of a model: its layers in two halves, and how the tokens are pooled."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tersor.tokencomp.state import TokenState

# what pooling may ask for: the state of the latest forward, and the bias that attention over its tokens needs
Latest = Callable[[], tuple[TokenState, Tensor | None]]


class Layer(Protocol):
    """One transformer layer, cut between its attention and its MLP."""

    @property
    def module(self) -> nn.Module:
        """The one whose forward is replaced."""
        ...

    def attend(self, x: Tensor, bias: Tensor | None, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        """`x` after attention and residual, and the keys (batch, heads, tokens, head_dim).

        `bias` (batch, tokens) is added to the logits of each key; `args`, `kwargs` are what else the layer was given.
        """
        ...

    def feed(self, x: Tensor) -> Tensor:
        """`x` after MLP and residual."""
        ...

    def macs(self, tokens_in: int, tokens_out: int) -> int:
        """Multiply-adds of the matrix products per image: attention over `tokens_in`, MLP over `tokens_out`."""
        ...

    def check(self) -> None:
        """Raise NotImplementedError for a setting under which the layer cannot be slimmed."""
        ...


@dataclass(frozen=True)
class Tower:
    """The part of a model that is slimmed.

    Args:
        layers: in the order in which they run.
        num_protected: tokens in front that stay: class, distillation, registers.
        attach_pooling: makes the model's own pooling count each token with its size; what it changes goes on the stack.
    """

    layers: tuple[Layer, ...]
    num_protected: int
    attach_pooling: Callable[[ExitStack, Latest], None] = lambda stack, latest: None


def layer_macs(attention: nn.Module, mlp: nn.Module, width: int, tokens_in: int, tokens_out: int) -> int:
    """Linear layers once per token, and q k^T and its product with v: 2 N^2 `width` (all heads together)."""
    return tokens_in * linear_macs(attention) + 2 * tokens_in**2 * width + tokens_out * linear_macs(mlp)


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of the linear layers in `module`; quantised ones tell their `weight_shape`."""
    shapes = [
        m.weight.shape if isinstance(m, nn.Linear) else getattr(m, "weight_shape", (0, 0)) for m in module.modules()
    ]
    return sum(out * in_ for out, in_ in shapes)
