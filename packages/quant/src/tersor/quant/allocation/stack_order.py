"""In which order the blocks of stacked layers are loaded: BitStack."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from tersor.quant.calibration import batches
from tersor.quant.elastic import stacks, with_blocks
from tersor.quant.quantize import evaluating
from tersor.quant.teacher import Teacher, rows


@dataclass(frozen=True)
class StackOrder:
    """Level by level: with i blocks in all layers, one layer after the other has i + 1; the best goes first.

    Source: arXiv:2410.23918, section 3.2. The paper measures perplexity; here it is the KL divergence of the whole stack's
    predictions, which needs no labels and sees small changes on less text. One pass of the text for each block but the
    first of each layer; the model is held once more, decoded.

    A layer with which predictions are not finite comes after the others of its level, in the order of the next one.

    Args:
        top_k: see `Teacher`.
    """

    top_k: int | None = 64

    @torch.no_grad()
    def order(self, model: Any, text: Any) -> list[str]:
        """Names of the layers, each once for every block beyond its first, in the order of loading: for `save_stack`.

        Args:
            model: quantised to stacks of blocks; it stays as it is.
            text: as the calibration data of `quantize`; other text than that is best.

        Raises:
            ValueError: no layer is a stack.
        """
        layers = stacks(model)
        blocks = {name: layer.scheme.grid.blocks for name, layer in layers.items()}
        levels: list[dict[str, float]] = []

        def decoded(name: str, level: int) -> torch.nn.Linear:
            return with_blocks(layers[name], min(level, blocks[name])).to_linear(model.dtype)

        with evaluating(model):
            teacher = Teacher(model, rows(batches(text)), self.top_k)
            try:
                for level in range(1, max(blocks.values())):
                    lower = {name: decoded(name, level) for name in layers}
                    for name, linear in lower.items():
                        model.set_submodule(name, linear)
                    found = {}
                    for name in (name for name in layers if blocks[name] > level):
                        model.set_submodule(name, decoded(name, level + 1))
                        found[name] = teacher.divergence()
                        model.set_submodule(name, lower[name])
                    levels.append(found)
            finally:
                for name, layer in layers.items():
                    model.set_submodule(name, layer)
        return ordered(levels)


def ordered(levels: Sequence[dict[str, float]]) -> list[str]:
    """Layers by what the model loses with one more block of theirs, level by level.

    >>> ordered([{"q": 0.3, "k": float("nan"), "v": 0.2, "o": float("nan")}, {"q": 0.1, "k": 0.2, "v": 0.3, "o": 0.1}])
    ['v', 'q', 'o', 'k', 'q', 'o', 'k', 'v']
    """

    def key(name: str, level: int) -> tuple[float, ...]:
        if level == len(levels) or name not in levels[level]:
            return ()
        loss = levels[level][name]
        return (0, loss) if isfinite(loss) else (1, *key(name, level + 1))

    return [name for level, losses in enumerate(levels) for name in sorted(losses, key=lambda name: key(name, level))]
