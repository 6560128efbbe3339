"""What grids share whose levels are a codebook of scalars, times a scale for each group."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import lookup_linear, pack_bits, unpack_bits
from tersor.quant.grid.protocol import Buffer, Params, Stored, bits_of, groups


class ScaleParams(NamedTuple):
    scale: Tensor  # (out, groups), rounded as it is stored


class CodebookGrid(ABC):
    """Levels codebook[code] * scale, the scale that of a group of neighbours in a row; where it is 0, so are the levels.

    A grid of this kind is a frozen dataclass with a `group_size` and the abstract members below. Where scales are
    anything but a float16 per group, it also says how they are made of its parameters and stored.
    """

    group_size: int | None

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @property
    @abstractmethod
    def codebook(self) -> tuple[float, ...]:
        """The 2^bits levels of scale 1, in the order of their codes."""

    @abstractmethod
    def fit(self, weight: Tensor) -> Any: ...

    def refit(self, weight: Tensor, params: Params) -> Any:
        return self.fit(weight)

    def nearest(self, steps: Tensor) -> Tensor:
        """Codes (uint8) of the levels of scale 1 nearest to `steps`, of two the lower one; the codebook must ascend."""
        levels = torch.tensor(self.codebook, device=steps.device)
        return torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)

    def scale(self, params: Params, out_features: int) -> Tensor:
        """What multiplies the levels, (out, groups), of any floating dtype."""
        return params.scale

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        return {"scale_bits": Buffer((out_features, groups), torch.int16)}

    def pack_scale(self, params: Params) -> dict[str, Tensor]:
        return {"scale_bits": bits_of(params.scale)}

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> Any:
        return ScaleParams(stored["scale_bits"].view(torch.float16))

    @property
    def per_row(self) -> bool:
        return True

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def whole(self) -> Self:
        return replace(self, group_size=None)  # pyright: ignore[reportArgumentType]

    def grouped(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) in float32 as (out, groups, group_size)."""
        return weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        scale = self.scale(params, len(weight)).float()
        # where the scale is 0, any code will do
        steps = weight.float().unflatten(-1, (scale.shape[-1], -1)) / scale.where(scale != 0, 1.0)[..., None]
        return self.nearest(steps).flatten(-2)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return _levels(codes, torch.tensor(self.codebook, device=codes.device), self.scale(params, len(codes)))

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        codes = Buffer((out_features, -(-in_features // 8) * self.bits), torch.uint8)
        return {"codes": codes} | self.scale_layout(out_features, self.groups(in_features))

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes, self.bits)} | self.pack_scale(params)

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, Any]:
        return unpack_bits(stored["codes"], self.bits, shape[1]), self.unpack_scale(stored, shape)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        scale = self.scale(self.unpack_scale(stored, shape), shape[0])
        codebook = torch.tensor(self.codebook, device=scale.device)
        return stored["codes"], codebook, scale, self.bits, shape[1] // scale.shape[1]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return lookup_linear(x, *prepared)


def _levels(codes: Tensor, codebook: Tensor, scale: Tensor) -> Tensor:
    # on CPUs many times as fast as codebook[codes]
    levels = codebook.index_select(0, codes.flatten().int()).view(*codes.shape[:-1], scale.shape[-1], -1)
    return levels.mul_(scale[..., None].float()).flatten(-2)


def as_float16(scale: Tensor) -> Tensor:
    """`scale`, rounded.

    Raises:
        ValueError: it is not finite, or too large.
    """
    half = scale.half()
    if not half.isfinite().all():
        raise ValueError(
            f"weights need scales up to {float(scale.max()):.3g}, beyond float16; divide them by a constant"
        )
    return half
