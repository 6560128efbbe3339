"""PTQ1.61's loss for the scales of a block."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tersor.quant.tuning.block_mse import BlockMSE


@dataclass(frozen=True)
class BlockScales(BlockMSE):
    """`BlockMSE` whose loss also counts how far outputs point elsewhere: - log mean cos (arXiv:2502.13179).

    Both against the original block on the same inputs and against the original model. Made for `MaskedBinary`, where
    alpha, the means and the columns are learnt, it works on any grid. Unlike the paper, errors are relative to the
    outputs, and the scales of the integers are learnt as well.

    Args:
        also: none by default.
    """

    steps: int = 200
    rate: float = 2e-2
    target: Literal["inputs", "dense", "both"] = "both"
    also: tuple[str, ...] = ()

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        cosine = F.cosine_similarity(output.float(), target.float(), dim=-1).mean()
        # early on, outputs of one bit may point anywhere; a logarithm needs some cosine
        return super().distance(output, target) - cosine.clamp(min=1e-3).log()
