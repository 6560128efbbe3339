"""Seeds of a pseudo-random generator in place of a codebook: SeedLM."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits
from tersor.quant.grid.decoded import decoded_linear
from tersor.quant.grid.protocol import Buffer, Stored

# bits of a register -> those whose sum mod 2 comes in; with these it takes all states but zero
TAPS = {8: (8, 6, 5, 4), 10: (10, 7), 12: (12, 6, 4, 1), 14: (14, 5, 3, 1), 16: (16, 15, 13, 4)}
# blocks that are searched at a time, and seeds: their products are 2 MiB
_BLOCKS = 512
_SEEDS = 1024
# seeds of which only the best one's product is kept
_TOGETHER = 8
# numbers that are held of seeds with rounded coefficients: 16 MiB
_PRODUCTS = 2**22


class SeedParams(NamedTuple):
    """None: all is in the codes."""


@dataclass(frozen=True)
class SeedGrid:
    """Blocks of weights as U(seed) t: a pseudo-random matrix times a few coefficients (SeedLM, arXiv:2410.10714).

    The states of a linear-feedback shift register that follow the seed fill V (block, num_coefficients), row by row, and
    U = (V - 2^(seed_bits - 1)) / (2^(seed_bits - 1) - 1). The coefficients are integers of 4 bits times a power of two of
    their block. The seed is that of least squared error of all. Nothing else is stored: 4 bits per weight in blocks of 8 with
    3 coefficients, 3 bits in blocks of 12 with 4. Sums of integers are exact in float32, so every device decodes the
    same bits.

    All seeds are tried: a million weights in blocks of 8 take 17 seconds on one core with 2^16 seeds, and four with
    `seed_bits=12`, which is 3.5 bits and a squared error more than twice as large.

    Args:
        block: neighbours in a row that share a seed; must divide the layer's `in`.
        num_coefficients: fewer than `block`.
        seed_bits: 8, 10, 12, 14 or 16.
        largest_exponent: powers of two are 2^(largest_exponent - 15) ... 2^largest_exponent, so by default weights
            should lie between 2^-13 and 7.
    """

    block: int = 8
    num_coefficients: int = 3
    seed_bits: int = 16
    largest_exponent: int = 0
    per_row = True

    def __post_init__(self) -> None:
        if self.seed_bits not in TAPS:
            raise ValueError(f"seed_bits must be one of {', '.join(map(str, TAPS))}, got {self.seed_bits}")
        if not 1 <= self.num_coefficients < self.block:
            raise ValueError(f"num_coefficients must be 1 to block - 1 = {self.block - 1}, got {self.num_coefficients}")

    def check(self, out_features: int, in_features: int) -> None:
        if in_features % self.block:
            offer = ", ".join(str(d) for d in range(4, 17) if in_features % d == 0)
            way_out = f"use block = {offer}" if offer else "keep it as it is"
            raise ValueError(f"in = {in_features} is not a multiple of block = {self.block}; {way_out}")

    def fit(self, weight: Tensor) -> SeedParams:
        """Nothing.

        Raises:
            ValueError: weights are too large for the exponents.
        """
        self.check(*weight.shape)
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if not largest <= 7 * 2.0**self.largest_exponent:
            needed = torch.tensor(largest / 7).log2().ceil()
            raise ValueError(
                f"weights up to {largest:.3g} are beyond the largest coefficient; use largest_exponent = {needed:.0f}"
            )
        return SeedParams()

    def encode(self, weight: Tensor, params: SeedParams) -> Tensor:
        """Codes (out, in / block, 2 + num_coefficients), int32: seed, steps below largest_exponent, coefficients."""
        blocks = weight.float().reshape(-1, self.block)
        codes = [self._search(part) for part in blocks.split(_BLOCKS)]
        return torch.cat(codes).view(len(weight), -1, 2 + self.num_coefficients)

    def decode(self, codes: Tensor, params: SeedParams) -> Tensor:
        numbers = _numbers(self.seed_bits, self.block, self.num_coefficients, codes.device)
        vectors = numbers.index_select(0, codes[..., 0].flatten()).view(*codes.shape[:-1], *numbers.shape[1:])
        sums = (vectors * codes[..., None, 2:]).sum(-1)
        power = ((127 + self.largest_exponent - codes[..., 1:2]) << 23).view(torch.float32)
        return (sums * (power * (1 / (2 ** (self.seed_bits - 1) - 1)))).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        blocks = in_features // self.block
        layout = {
            "seeds": Buffer((out_features, blocks), torch.uint8),
            "coefficients": Buffer((out_features, -(-blocks * (1 + self.num_coefficients) // 8) * 4), torch.uint8),
        }
        if self.seed_bits > 8:
            layout["seeds_above"] = Buffer((out_features, -(-blocks // 8) * (self.seed_bits - 8)), torch.uint8)
        return layout

    def pack(self, codes: Tensor, params: SeedParams) -> dict[str, Tensor]:
        seeds = codes[..., 0]
        # two's complement
        fields = (codes[..., 1:] & 15).to(torch.uint8)
        packed = {"seeds": (seeds & 255).to(torch.uint8), "coefficients": pack_bits(fields.flatten(-2), 4)}
        if self.seed_bits > 8:
            packed["seeds_above"] = pack_bits((seeds >> 8).to(torch.uint8), self.seed_bits - 8)
        return packed

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, SeedParams]:
        seeds = stored["seeds"].int()
        if self.seed_bits > 8:
            seeds = seeds | unpack_bits(stored["seeds_above"], self.seed_bits - 8, seeds.shape[1]).int() << 8
        fields = unpack_bits(stored["coefficients"], 4, seeds.shape[1] * (1 + self.num_coefficients))
        below, coefficients = fields.int().unflatten(-1, (seeds.shape[1], -1)).split([1, self.num_coefficients], -1)
        return torch.cat([seeds[..., None], below, (coefficients ^ 8) - 8], -1), SeedParams()

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        return stored, shape

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        stored, shape = prepared

        def decode(rows: slice) -> Tensor:
            return self.decode(*self.unpack({name: buffer[rows] for name, buffer in stored.items()}, shape))

        return decoded_linear(x, decode, shape[0])

    def _search(self, blocks: Tensor) -> Tensor:
        """Codes (blocks, 2 + num_coefficients) of `blocks` (blocks, block).

        Seeds are tried in the order of what unrounded coefficients would leave, some at a time, until that is more than what
        the best one leaves with rounded ones.
        """
        left = blocks.square().sum(-1, keepdim=True) - self._explained(blocks)
        codes = blocks.new_zeros(len(blocks), 2 + self.num_coefficients, dtype=torch.int32)
        open_, count, groups = torch.arange(len(blocks), device=blocks.device), 4, left.shape[1]
        within = torch.arange(0, 2**self.seed_bits, groups, device=blocks.device)
        while len(open_):
            count = min(count, groups)
            again = []
            held = self.block * self.num_coefficients * _TOGETHER * count
            for some in open_.split(max(1, _PRODUCTS // held)):
                least, group = left[some].topk(count, largest=False)
                # seed 0 has no states, and stands where seed 1 does
                codes[some], error = self._rounded(blocks[some], (group[..., None] + within).flatten(1).clamp(min=1))
                again.append(some[error > least[:, -1]])
            open_ = torch.cat(again) if count < groups else open_[:0]
            count *= 4
        return codes

    def _explained(self, blocks: Tensor) -> Tensor:
        """Of |w|^2 (blocks,) the most that unrounded coefficients explain with a seed of each group (blocks, groups).

        Group g has the seeds g, g + groups, g + 2 groups, ...
        """
        parts = _projections(self.seed_bits, self.block, self.num_coefficients, blocks.device)
        i, j = torch.triu_indices(self.block, self.block, device=blocks.device)
        products = blocks[:, i] * blocks[:, j]
        # the largest of a part while it is in the cache
        return torch.cat([(products @ part.T).unflatten(1, (_TOGETHER, -1)).amax(1) for part in parts], 1)

    def _rounded(self, blocks: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `blocks` with the best of `seeds` (blocks, seeds), and the squared error."""
        inverses = _inverses(self.seed_bits, self.block, self.num_coefficients, blocks.device)
        exact = (inverses[seeds] @ blocks[:, None, :, None]).squeeze(-1)  # (blocks, seeds, coefficients)
        # the least power of two of which no coefficient rounds to more than 7
        _, exponent = torch.frexp(exact.abs().amax(-1) / 7.5)
        below = (self.largest_exponent - exponent).clamp(0, 15)
        power = ((127 + self.largest_exponent - below) << 23).view(torch.float32)
        coefficients = (exact / power[..., None]).round().clamp(-8, 7).int()
        codes = torch.cat([seeds[..., None].int(), below[..., None], coefficients], -1)
        error = (self.decode(codes, SeedParams()).view(*seeds.shape, -1) - blocks[:, None]).square().sum(-1)
        best = error.argmin(-1, keepdim=True)
        return codes.take_along_dim(best[..., None], 1).squeeze(1), error.take_along_dim(best, 1).squeeze(1)


def states(seed_bits: int) -> list[int]:
    """All states of the register, from 1 on."""
    found = [1]
    while len(found) < 2**seed_bits - 1:
        state = found[-1]
        new = sum(state >> tap - 1 for tap in TAPS[seed_bits]) & 1
        found.append((state << 1 | new) & 2**seed_bits - 1)
    return found


@cache
def _numbers(seed_bits: int, block: int, num_coefficients: int, device: torch.device) -> Tensor:
    """V - 2^(seed_bits - 1) of every seed, (2^seed_bits, block, num_coefficients), integers in float32; seed 0 has none."""
    order = torch.tensor(states(seed_bits))
    size = block * num_coefficients
    # the states that follow each one, around the end
    windows = torch.cat([order, order[:size]])[1:].unfold(0, size, 1)
    numbers = torch.zeros(2**seed_bits, size)
    numbers[order] = (windows - 2 ** (seed_bits - 1)).float()
    return numbers.view(-1, block, num_coefficients).to(device)


@cache
def _factors(seed_bits: int, block: int, num_coefficients: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Q and R of U of every seed but 0, float64."""
    numbers = _numbers(seed_bits, block, num_coefficients, device)[1:].double() / (2 ** (seed_bits - 1) - 1)
    return torch.linalg.qr(numbers)


@cache
def _inverses(seed_bits: int, block: int, num_coefficients: int, device: torch.device) -> Tensor:
    """Pseudo-inverse of U of every seed, (2^seed_bits, num_coefficients, block); seed 0 has none."""
    Q, R = _factors(seed_bits, block, num_coefficients, device)
    inverses = torch.linalg.solve_triangular(R, Q.mT, upper=True).float()
    return torch.cat([torch.zeros_like(inverses[:1]), inverses])


@cache
def _projections(seed_bits: int, block: int, num_coefficients: int, device: torch.device) -> Tensor:
    """Times the products w_i w_j, i <= j, what seeds explain of |w|^2: (parts, seeds, block (block + 1) / 2).

    A part has some groups' first seeds, then their second ones, ...
    """
    Q, _ = _factors(seed_bits, block, num_coefficients, device)
    P = Q @ Q.mT
    i, j = torch.triu_indices(block, block, device=device)
    # w_i w_j stands for w_j w_i too
    projections = (P[:, i, j] * (1 + (i < j))).float()
    # seed 1 once more, for seed 0
    projections = torch.cat([projections[:1], projections]).unflatten(0, (_TOGETHER, -1))
    return torch.stack([part.flatten(0, 1) for part in projections.split(_SEEDS // _TOGETHER, 1)])
