"""Sums of vectors from codebooks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits, vector_codebook_linear
from tersor.quant.grid.codebook import as_float16
from tersor.quant.grid.protocol import Buffer, Stored, bits_of

# distances that are held at a time: 1 MiB, which stays in the cache; 16 take twice the time
_DISTANCES = 2**18
# vectors that k-means looks at for each point; of a quarter as many the error after a search is up to .9 % larger
_SAMPLES = 1024
# sums that `encode` keeps after each codebook: those of arXiv:2405.14852
_BEAM = 5


class AdditiveParams(NamedTuple):
    codebooks: Tensor  # (codebooks, 2^bits, vector_size), float16
    scale: Tensor  # (out, 1), float16


@dataclass(frozen=True)
class AdditiveGrid:
    """Vectors of neighbours in a row, scale * sum_m codebooks[m, code_m]; codebooks are the layer's, scales the row's.

    Source: AQLM (arXiv:2401.06118, equation 4), whose 2x8 is `AdditiveGrid(2, 8)` and whose 1x16 `AdditiveGrid(1, 16)`.
    A weight takes num_codebooks * codebook_bits / vector_size bits and its part of the codebooks, which are small beside
    layers of thousands of channels only: 2^16 vectors of 8 take a mebibyte.

    Args:
        num_codebooks: whose vectors are added.
        codebook_bits: bits of a code, 1 to 16.
        vector_size: neighbours that share the codes; must divide the layer's `in`.
    """

    num_codebooks: int = 1
    codebook_bits: int = 8
    vector_size: int = 8
    per_row = False

    def __post_init__(self) -> None:
        if self.num_codebooks < 1:
            raise ValueError(f"num_codebooks must be positive, got {self.num_codebooks}")
        if not 1 <= self.codebook_bits <= 16:
            raise ValueError(f"codebook_bits must be 1 to 16, got {self.codebook_bits}")
        if self.vector_size < 1:
            raise ValueError(f"vector_size must be positive, got {self.vector_size}")

    def check(self, out_features: int, in_features: int) -> None:
        if in_features % self.vector_size:
            divisors = [d for d in range(2, 2 * self.vector_size) if in_features % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.vector_size), default=1)
            raise ValueError(
                f"in = {in_features} is not a multiple of vector_size = {self.vector_size}; use vector_size = {nearest}"
            )

    def vectors(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) in float32 as (out, in / vector_size, vector_size)."""
        self.check(*weight.shape)
        return weight.float().unflatten(-1, (-1, self.vector_size))

    def fit(self, weight: Tensor) -> AdditiveParams:
        """Rows have the scale of their root mean square; codebooks are the k-means of what those before them leave."""
        scale = as_float16(weight.double().square().mean(-1, keepdim=True).sqrt())
        left = self._over_scale(weight, scale).flatten(0, 1)
        codebooks = []
        for _ in range(self.num_codebooks):
            codebooks.append(kmeans_vectors(left, 2**self.codebook_bits).half())
            left = left - codebooks[-1].float()[nearest(left, codebooks[-1].float())]
        return AdditiveParams(torch.stack(codebooks), scale)

    def encode(self, weight: Tensor, params: AdditiveParams) -> Tensor:
        """Codes (out, in / vector_size, codebooks), uint8, or int32 beyond 8 bits.

        The nearest sums that a beam search finds; of one codebook, the nearest vectors.
        """
        vectors = self._over_scale(weight, params.scale)
        codes = _nearest_sums(vectors.flatten(0, 1), params.codebooks.float())
        return codes.view(*vectors.shape[:2], -1).to(self._code_dtype)

    def decode(self, codes: Tensor, params: AdditiveParams) -> Tensor:
        starts = torch.arange(0, self.num_codebooks << self.codebook_bits, 2**self.codebook_bits, device=codes.device)
        # one index into all of them: on CPUs many times as fast as codebook by codebook
        index = (codes.int() + starts.int()).flatten()
        sums = params.codebooks.float().flatten(0, 1).index_select(0, index).view(*codes.shape, -1).sum(-2)
        return (sums * params.scale[..., None].float()).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        self.check(out_features, in_features)
        eights = -(-(in_features // self.vector_size) * self.num_codebooks // 8)
        return {
            name: Buffer((out_features, eights * bits), torch.uint8) for name, bits in self._code_buffers.items()
        } | {
            "codebook_bits": Buffer((self.num_codebooks, 2**self.codebook_bits, self.vector_size), torch.int16),
            "scale_bits": Buffer((out_features, 1), torch.int16),
        }

    def pack(self, codes: Tensor, params: AdditiveParams) -> dict[str, Tensor]:
        rows = codes.flatten(1)
        parts = {"codes": rows & 255, "high_codes": rows.int() >> 8}
        packed = {name: pack_bits(parts[name].to(torch.uint8), bits) for name, bits in self._code_buffers.items()}
        return packed | {"codebook_bits": bits_of(params.codebooks), "scale_bits": bits_of(params.scale)}

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, AdditiveParams]:
        count = shape[1] // self.vector_size * self.num_codebooks
        low, *high = (unpack_bits(stored[name], bits, count) for name, bits in self._code_buffers.items())
        codes = low.to(self._code_dtype) + (high[0].int() << 8) if high else low
        params = AdditiveParams(*(stored[name].view(torch.float16) for name in ("codebook_bits", "scale_bits")))
        return codes.unflatten(-1, (-1, self.num_codebooks)), params

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        codes, (codebooks, scale) = self.unpack(stored, shape)
        return codes.to(torch.uint8 if self.codebook_bits <= 8 else torch.uint16), codebooks, scale[:, 0]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return vector_codebook_linear(x, *prepared)

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.codebook_bits <= 8 else torch.int32

    @property
    def _code_buffers(self) -> dict[str, int]:
        """Of each buffer of codes, the bits that it holds of a code: of long ones the low byte, and the rest."""
        bits = self.codebook_bits
        return {"codes": bits} if bits <= 8 else {"codes": 8, "high_codes": bits - 8}

    def _over_scale(self, weight: Tensor, scale: Tensor) -> Tensor:
        # where the scale is 0, any code will do
        scale = scale.float()
        return self.vectors(weight) / scale.where(scale != 0, 1.0)[..., None]


def kmeans_vectors(vectors: Tensor, n: int, max_steps: int = 25) -> Tensor:
    """n points (n, size) that `vectors` (m, size) lie near to in the sum of squares: Lloyd's algorithm from n of them.

    Points that no vector is nearest to move to where the error is largest. Stops before `max_steps` when nothing moves.
    Of many vectors some are looked at.
    """
    generator = torch.Generator().manual_seed(0)
    if len(vectors) > _SAMPLES * n:
        some = torch.randperm(len(vectors), generator=generator)[: _SAMPLES * n]
        vectors = vectors[some.to(vectors.device)]
    vectors, m = vectors.float(), len(vectors)
    points = vectors[torch.randperm(m, generator=generator)[torch.arange(n) % m].to(vectors.device)]
    for _ in range(max_steps):
        codes = nearest(vectors, points)
        count = codes.bincount(minlength=n)
        moved = torch.zeros_like(points).index_add_(0, codes, vectors) / count[:, None].clamp(min=1)
        empty = (count == 0).nonzero()[:m, 0]
        if len(empty):
            error = (vectors - points[codes]).square().sum(-1)
            moved[empty] = vectors[error.topk(len(empty)).indices]
        if torch.equal(moved, points):
            break
        points = moved
    return points


def nearest(vectors: Tensor, points: Tensor) -> Tensor:
    """For each of `vectors` (m, size) the index of the nearest of `points` (n, size)."""
    half_norms = points.square().sum(-1) / 2
    blocks = vectors.split(max(1, _DISTANCES // len(points)))
    return torch.cat([(block @ points.T - half_norms).argmax(-1) for block in blocks])


def _nearest_sums(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """Codes (m, codebooks) of sums near to `vectors` (m, size)."""
    if len(codebooks) == 1:
        return nearest(vectors, codebooks[0])[:, None]
    blocks = vectors.split(max(1, _DISTANCES // (_BEAM * codebooks.shape[1])))
    return torch.cat([_beam_search(block, codebooks) for block in blocks])


def _beam_search(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """The best sums of a vector from each codebook; each is then chosen once more, given the others."""
    size, half_norms = codebooks.shape[1], codebooks.square().sum(-1) / 2
    rows = torch.arange(len(vectors), device=vectors.device)[:, None]
    left = vectors[:, None]  # (m, beam, size)
    codes = torch.zeros(len(vectors), 1, len(codebooks), dtype=torch.long, device=vectors.device)
    for again in (False, True):
        for m, codebook in enumerate(codebooks):
            if again:
                left = left + codebook[codes[..., m]]
            score = left @ codebook.T - half_norms[m] - left.square().sum(-1, keepdim=True) / 2
            # (in the second round two sums may become the same: then fewer are kept)
            best = score.flatten(1).topk(min(_BEAM, score[0].numel())).indices
            source, code = best // size, best % size
            codes, left = codes[rows, source], left[rows, source] - codebook[code]
            codes[..., m] = code
    return codes[:, 0]
