"""One bit per weight, but for the inputs that matter most."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits
from tersor.quant.grid.binary import BinaryGrid, BinaryParams
from tersor.quant.grid.integer import IntGrid, IntParams
from tersor.quant.grid.protocol import Buffer, Stored, bits_of

_SIGNS = BinaryGrid(None, centred=True)


class MaskedBinaryParams(NamedTuple):
    salient: Tensor  # (1, in), bool: the inputs whose weights are integers
    scale: Tensor  # (out, 1), float16, of the integers
    zero_point: Tensor  # (out, 1), uint8
    alpha: Tensor  # (out, 1), float16, of the signs
    mean: Tensor  # (out, 1), float16
    column: Tensor  # (1, others), float16: what the weights of each other input are multiplied by


@dataclass(frozen=True)
class MaskedBinary:
    """Weights of salient inputs: integers, per row; all others: (mean +- alpha) * column (arXiv:2502.13179).

    The mask is one of inputs, so it costs a bit for each of them: 1.61 bits per weight, and the vectors, .03 for a layer
    of 2048 x 2048. alpha is mean |w - mean|, the best one for given signs (the authors' code starts with mean |w|), and
    `column` is one until it is learnt. The paper's factor for each row is no buffer of its own: alpha and the mean, both
    of the row, take it up.

    Args:
        salient: share of the inputs; at 1 this is `IntGrid(salient_bits, None)`.
        salient_bits: of their weights' codes, 1 to 8.
    """

    salient: float = 0.2
    salient_bits: int = 4
    per_row = False

    def __post_init__(self) -> None:
        if not 0 < self.salient <= 1:
            raise ValueError(f"salient must be above 0 and at most 1, got {self.salient}")
        if not 1 <= self.salient_bits <= 8:
            raise ValueError(f"salient_bits must be 1 to 8, got {self.salient_bits}")

    @property
    def _integers(self) -> IntGrid:
        return IntGrid(self.salient_bits, None)

    def num_salient(self, in_features: int) -> int:
        return round(self.salient * in_features)

    def check(self, out_features: int, in_features: int) -> None:
        if not self.num_salient(in_features):
            raise ValueError(
                f"salient = {self.salient} of in = {in_features} is no input; use salient = {1 / in_features:.2g} or more"
            )

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> MaskedBinaryParams:
        """Parameters for `weight` (out, in).

        Args:
            importance: (in,), of inputs: the largest are salient. None: the norms of their weights. The paper takes the
                inputs' largest absolute values, which one outlying token decides; `WeightedRTN` their mean squares.
        """
        self.check(*weight.shape)
        if importance is None:
            importance = weight.float().square().sum(0)
        salient = torch.zeros_like(importance, dtype=torch.bool)
        # stable: of equals the first
        salient[importance.argsort(descending=True, stable=True)[: self.num_salient(weight.shape[1])]] = True
        scale, zero_point = self._integers.fit(weight[:, salient])
        others = weight[:, ~salient]
        alpha, mean = _SIGNS.fit(others) if others.shape[1] else (torch.zeros_like(scale), torch.zeros_like(scale))
        column = scale.new_ones(1, others.shape[1])
        return MaskedBinaryParams(salient[None], scale, zero_point, alpha, mean, column)

    def encode(self, weight: Tensor, params: MaskedBinaryParams) -> Tensor:
        """Codes (out, in), uint8: integers of salient inputs, otherwise 1 at or above the mean and 0 below."""
        salient, others = _inputs(params)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        codes[:, salient] = self._integers.encode(weight[:, salient], _integer(params))
        if len(others):
            column = params.column.float()
            # where a column is 0, any sign will do
            codes[:, others] = _SIGNS.encode(
                weight[:, others] / column.where(column != 0, 1.0), BinaryParams(params.alpha, params.mean)
            )
        return codes

    def decode(self, codes: Tensor, params: MaskedBinaryParams) -> Tensor:
        salient, others = _inputs(params)
        decoded = self._integers.decode(codes[:, salient], _integer(params))
        if len(others):
            signs = _SIGNS.decode(codes[:, others], BinaryParams(params.alpha, params.mean))
            decoded = torch.cat([decoded, signs * params.column.float()], -1)
        return decoded[:, torch.cat([salient, others]).argsort()]

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        num_salient = self.num_salient(in_features)
        num_others = in_features - num_salient
        layout = {"salient": Buffer((-(-in_features // 8),), torch.uint8)}
        layout |= _prefixed("integer_", self._integers.layout(out_features, num_salient))
        if num_others:
            layout |= _prefixed("sign_", _SIGNS.layout(out_features, num_others))
            layout["column_bits"] = Buffer((1, num_others), torch.int16)
        return layout

    def pack(self, codes: Tensor, params: MaskedBinaryParams) -> dict[str, Tensor]:
        salient, others = _inputs(params)
        packed = {"salient": pack_bits(params.salient[0].to(torch.uint8), 1)}
        packed |= _prefixed("integer_", self._integers.pack(codes[:, salient], _integer(params)))
        if len(others):
            signs = _SIGNS.pack(codes[:, others], BinaryParams(params.alpha, params.mean))
            packed |= _prefixed("sign_", signs) | {"column_bits": bits_of(params.column)}
        return packed

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, MaskedBinaryParams]:
        mask = unpack_bits(stored["salient"], 1, shape[1]).bool()
        codes = torch.empty(shape, dtype=torch.uint8, device=mask.device)
        num_salient = self.num_salient(shape[1])
        codes[:, mask], integers = self._integers.unpack(_of("integer_", stored), (shape[0], num_salient))
        if num_salient == shape[1]:
            none = torch.zeros_like(integers.scale)
            return codes, MaskedBinaryParams(mask[None], *integers, none, none, none.new_ones(1, 0))
        codes[:, ~mask], signs = _SIGNS.unpack(_of("sign_", stored), (shape[0], shape[1] - num_salient))
        column = stored["column_bits"].view(torch.float16)
        return codes, MaskedBinaryParams(mask[None], *integers, alpha=signs.scale, mean=signs.mean, column=column)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        mask, num_salient = unpack_bits(stored["salient"], 1, shape[1]).bool(), self.num_salient(shape[1])
        prepared = mask.nonzero()[:, 0], self._integers.prepare(_of("integer_", stored), (shape[0], num_salient))
        if num_salient == shape[1]:
            return prepared
        signs = _SIGNS.prepare(_of("sign_", stored), (shape[0], shape[1] - num_salient))
        return *prepared, (~mask).nonzero()[:, 0], stored["column_bits"][0].view(torch.float16).float(), signs

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        # of two sums, only their own sum is rounded
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        salient, integers, *signed = prepared
        y = self._integers.linear(wide[..., salient], *integers)
        if signed:
            others, column, signs = signed
            y = y + _SIGNS.linear(wide[..., others] * column, *signs)
        return y.to(x.dtype)


def _inputs(params: MaskedBinaryParams) -> tuple[Tensor, Tensor]:
    """Positions of the salient inputs, and of the others."""
    return params.salient[0].nonzero()[:, 0], (~params.salient[0]).nonzero()[:, 0]


def _integer(params: MaskedBinaryParams) -> IntParams:
    return IntParams(params.scale, params.zero_point)


def _prefixed(prefix: str, buffers: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: buffer for name, buffer in buffers.items()}


def _of(prefix: str, stored: Stored) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): buffer for name, buffer in stored.items() if name.startswith(prefix)}
