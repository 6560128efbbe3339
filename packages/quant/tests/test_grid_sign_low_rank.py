"""SignLowRankStack: what blocks leave, what a prefix of them is, what they cost."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.quant.grid import SignLowRankStack, bits_per_weight
from tersor.quant.grid.sign_low_rank import SignLowRankParams
from tersor.quant.solver import relative_error


def stacked(weight: Tensor, grid: SignLowRankStack) -> tuple[Tensor, SignLowRankParams]:
    params = grid.fit(weight)
    return grid.encode(weight, params), params


def prefix(codes: Tensor, params: SignLowRankParams, blocks: int) -> tuple[Tensor, SignLowRankParams]:
    return codes[:blocks], SignLowRankParams(*(p[:blocks] for p in params))


def errors(weight: Tensor, grid: SignLowRankStack) -> list[float]:
    """Relative squared errors of 1, 2, ... blocks."""
    codes, params = stacked(weight, grid)
    decoded = (grid.decode(*prefix(codes, params, blocks)) for blocks in range(1, grid.blocks + 1))
    return [relative_error(weight, each, None) for each in decoded]


def test_gaussian_errors_are_the_known_ones(generator):
    weight = torch.randn(640, 2048, generator=generator)
    assert errors(weight, SignLowRankStack(4, 16)) == pytest.approx([0.343, 0.117, 0.0484, 0.0236], rel=0.03)


def test_the_svd_is_nearly_the_exact_one(generator):
    weight = torch.randn(200, 300, generator=generator)
    U, S, Vh = torch.linalg.svd(weight.abs(), full_matrices=False)
    exact = relative_error(weight.abs(), (U[:, :16] * S[:16]) @ Vh[:16], None)
    assert errors(weight, SignLowRankStack(1, 16))[0] <= 1.01 * exact


def matrices(generator) -> dict[str, Tensor]:
    normal = torch.randn(24, 40, generator=generator)
    alone = torch.zeros(24, 40)
    alone[3, 5] = -2.0
    return {
        "normal": normal,
        "tall": normal.T.contiguous(),
        "small": 1e-3 * normal,
        "large": 1e3 * normal,
        "heavy tails": normal**5,
        "positive": normal.abs() + 1,
        "constant": torch.full((24, 40), -0.3),
        "sparse": normal * (torch.rand(24, 40, generator=generator) < 0.1),
        "one weight": alone,
        "of rank 1": normal[:, :1] * normal[:1],
        "a large column": torch.cat([normal[:, :-1], 1e3 * normal[:, -1:]], 1),
    }


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", matrices(torch.Generator()))
def test_each_block_leaves_less(kind, rank, generator):
    found = errors(matrices(generator)[kind], SignLowRankStack(8, rank))
    # 2^-40: squares of float32's rounding, beyond which there is nothing to take
    assert all(after < before or before < 2**-40 for before, after in zip([1.0, *found], found))


def test_the_first_blocks_are_those_of_a_smaller_stack(generator):
    weight = torch.randn(24, 40, generator=generator)
    whole = SignLowRankStack(5, 4)
    codes, params = stacked(weight, whole)
    stored = whole.pack(codes, params)
    for blocks in range(1, 6):
        smaller = SignLowRankStack(blocks, 4)
        own_codes, own_params = stacked(weight, smaller)
        own = smaller.pack(own_codes, own_params)
        assert own.keys() == smaller.layout(24, 40).keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in own.items())
        assert torch.equal(smaller.decode(own_codes, own_params), whole.decode(*prefix(codes, params, blocks)))


def test_one_block_of_full_rank_is_the_weight(generator):
    for shape in ((24, 40), (40, 24)):
        weight = torch.randn(*shape, generator=generator)
        # of the norm: two roundings to float16, and sums of 24
        assert errors(weight, SignLowRankStack(1, 24))[0] ** 0.5 <= 2**-10


def test_no_other_sign_is_nearer_to_what_a_block_is_given(generator):
    weight = torch.randn(24, 40, generator=generator)
    grid = SignLowRankStack(3, 4)
    codes, params = stacked(weight, grid)
    left = weight
    for block in range(grid.blocks):
        of_block = [p[block : block + 1] for p in params]
        chosen, other = (grid.decode(c[block : block + 1], SignLowRankParams(*of_block)) for c in (codes, 1 - codes))
        assert ((left - chosen).abs() <= (left - other).abs()).all()
        left = left - chosen


def test_decoded_weights_of_one_block_are_fixed_points(generator):
    weight, grid = torch.randn(24, 40, generator=generator), SignLowRankStack(1, 4)
    codes, params = stacked(weight, grid)
    decoded = grid.decode(codes, params)
    assert torch.equal(grid.decode(grid.encode(decoded, params), params), decoded)


def test_a_block_costs_its_signs_and_its_factors():
    for out, in_features, rank in ((640, 2048, 16), (256, 768, 4)):
        block = 1 + 16 * rank * (out + in_features) / (out * in_features)
        for blocks in (1, 3):
            assert bits_per_weight(SignLowRankStack(blocks, rank), out, in_features) == pytest.approx(blocks * block)
    assert bits_per_weight(SignLowRankStack(1, 16), 640, 2048) == 1.525


def test_important_columns_lose_less(generator):
    weight = torch.randn(32, 64, generator=generator)
    importance = torch.exp(3 * torch.randn(64, generator=generator))
    grid = SignLowRankStack(2, 4)

    def loss(params: SignLowRankParams) -> float:
        difference = weight - grid.decode(grid.encode(weight, params), params)
        return float((difference.square() * importance).sum())

    assert loss(grid.fit(weight, importance)) < 0.8 * loss(grid.fit(weight))


def test_importance_is_a_scale_of_columns_undone_in_the_factors(generator):
    """With it, no input need be divided by anything at run time, whatever comes before the layer."""
    weight = torch.randn(32, 64, generator=generator)
    scale = 2.0 ** torch.randint(-2, 3, (64,), generator=generator)
    grid = SignLowRankStack(1, 4)
    # what `fit` makes of the importance: relative to the mean, and never zero
    reached = scale / scale.mean() + 1e-3
    codes, params = stacked(weight * reached, grid)
    own = grid.fit(weight, scale.square())
    torch.testing.assert_close(
        # the roundings to float16 of both
        grid.decode(grid.encode(weight, own), own),
        grid.decode(codes, params) / reached,
        rtol=2**-9,
        atol=2**-9,
    )


def test_the_unit_of_the_inputs_does_not_matter(generator):
    weight, importance = torch.randn(32, 64, generator=generator), torch.rand(64, generator=generator)
    grid = SignLowRankStack(2, 4)
    for unit in (2.0**-20, 2.0**20):
        assert all(map(torch.equal, grid.fit(weight, importance), grid.fit(weight, unit * importance)))


def test_dead_inputs_do_no_harm(generator):
    weight, importance = torch.randn(32, 64, generator=generator), torch.rand(64, generator=generator)
    importance[::3] = 0
    for each in (importance, torch.zeros(64)):
        grid = SignLowRankStack(3, 4)
        params = grid.fit(weight, each)
        assert relative_error(weight, grid.decode(grid.encode(weight, params), params), torch.diag(each)) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_those_with_all_blocks(dtype, generator):
    # wide enough to be decoded in several parts
    weight, x = torch.randn(20, 2**15, generator=generator), torch.randn(3, 2**15, generator=generator).to(dtype)
    grid = SignLowRankStack(3, 2)
    codes, params = stacked(weight, grid)
    stored = grid.pack(codes, params)
    y = grid.linear(x, *grid.prepare(stored, (20, 2**15)))
    expected = F.linear(x.double(), grid.decode(codes, params).double())
    # of the largest: sums of 2^15 products in float32, in another order; then the mantissa of the result
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-18
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_codes_and_parameters_come_back_from_what_is_stored(generator):
    weight, grid = torch.randn(20, 44, generator=generator), SignLowRankStack(3, 2)
    codes, params = stacked(weight, grid)
    stored = grid.pack(codes, params)
    assert {name: (tuple(b.shape), b.dtype) for name, b in stored.items()} == grid.layout(20, 44)
    again, again_params = grid.unpack(stored, (20, 44))
    assert torch.equal(again, codes)
    assert all(map(torch.equal, again_params, params))


def test_products_hold_nothing_but_what_is_stored(generator):
    weight, grid = torch.randn(32, 64, generator=generator), SignLowRankStack(2, 4)
    stored = grid.pack(*stacked(weight, grid))
    held, _ = grid.prepare(stored, (32, 64))
    assert {tensor.data_ptr() for tensor in held.values()} == {tensor.data_ptr() for tensor in stored.values()}


def test_ranks_beyond_the_weight_are_refused():
    with pytest.raises(ValueError, match=r"rank = 16 is beyond that of a weight \(8, 64\); use at most 8"):
        SignLowRankStack(2, 16).check(8, 64)
    for blocks, rank in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="blocks and rank must be positive"):
            SignLowRankStack(blocks, rank)


def test_weights_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="beyond float16; divide them by a constant"):
        SignLowRankStack(1, 4).fit(torch.full((8, 16), 1e12))
