"""Published quantisers, as a choice of pieces."""

from dataclasses import replace as _replace
from typing import Literal as _Literal

from tersor.quant.activation import BipolarActivation as _BipolarActivation
from tersor.quant.activation import BlockMixedActivation as _BlockMixedActivation
from tersor.quant.activation import IntActivation as _IntActivation
from tersor.quant.activation import PlaneActivation as _PlaneActivation
from tersor.quant.activation import StaticActivation as _StaticActivation
from tersor.quant.allocation import Evolution as _Evolution
from tersor.quant.allocation import IntegerProgram as _IntegerProgram
from tersor.quant.allocation import LayerDivergence as _LayerDivergence
from tersor.quant.allocation import MaskSensitivity as _MaskSensitivity
from tersor.quant.allocation import MeasuredCost as _MeasuredCost
from tersor.quant.allocation import MixedGrids as _MixedGrids
from tersor.quant.compensation import LowRank as _LowRank
from tersor.quant.compensation import SparseOutliers as _SparseOutliers
from tersor.quant.grid import AdditiveGrid as _AdditiveGrid
from tersor.quant.grid import BilevelInt as _BilevelInt
from tersor.quant.grid import BipolarInt as _BipolarInt
from tersor.quant.grid import BitBalance as _BitBalance
from tersor.quant.grid import DoubleNormalFloatGrid as _DoubleNormalFloatGrid
from tersor.quant.grid import DualBinary as _DualBinary
from tersor.quant.grid import DualGrain as _DualGrain
from tersor.quant.grid import FloatGrid as _FloatGrid
from tersor.quant.grid import GaussianPairGrid as _GaussianPairGrid
from tersor.quant.grid import IntGrid as _IntGrid
from tersor.quant.grid import MaskedBinary as _MaskedBinary
from tersor.quant.grid import MXFP4Grid as _MXFP4Grid
from tersor.quant.grid import NVFP4Grid as _NVFP4Grid
from tersor.quant.grid import SeedGrid as _SeedGrid
from tersor.quant.grid import SignLowRankStack as _SignLowRankStack
from tersor.quant.recipe import Recipe as _Recipe
from tersor.quant.solver import GPTQ as _GPTQ
from tersor.quant.solver import HQQ as _HQQ
from tersor.quant.solver import RTN as _RTN
from tersor.quant.solver import BeamSearch as _BeamSearch
from tersor.quant.solver import ClipSearch as _ClipSearch
from tersor.quant.solver import CoordinateDescent as _CoordinateDescent
from tersor.quant.solver import DualGrainSearch as _DualGrainSearch
from tersor.quant.solver import LearnedRounding as _LearnedRounding
from tersor.quant.solver import SpQR as _SpQR
from tersor.quant.solver import WeightedRTN as _WeightedRTN
from tersor.quant.transform import ActScale as _ActScale
from tersor.quant.transform import Butterfly as _Butterfly
from tersor.quant.transform import DistributionCorrection as _DistributionCorrection
from tersor.quant.transform import Hadamard as _Hadamard
from tersor.quant.transform import LearnedRange as _LearnedRange
from tersor.quant.transform import PercentileSmooth as _PercentileSmooth
from tersor.quant.transform import PermuteIntermediate as _PermuteIntermediate
from tersor.quant.transform import PermuteResidual as _PermuteResidual
from tersor.quant.transform import RotateHeads as _RotateHeads
from tersor.quant.transform import RotateResidual as _RotateResidual
from tersor.quant.transform import SearchedSmooth as _SearchedSmooth
from tersor.quant.transform import Smooth as _Smooth
from tersor.quant.tuning import PV as _PV
from tersor.quant.tuning import BlockMSE as _BlockMSE
from tersor.quant.tuning import BlockReconstruction as _BlockReconstruction
from tersor.quant.tuning import BlockScales as _BlockScales
from tersor.quant.tuning import DeviationAware as _DeviationAware
from tersor.quant.tuning import RestorativePreprocess as _RestorativePreprocess

__all__ = [
    "abq",
    "aqlm",
    "awq",
    "bipolar_int",
    "bitstack",
    "brecq",
    "butterflyquant",
    "calibtip",
    "comet",
    "dbllm",
    "dgq",
    "eora",
    "evopress",
    "fp8",
    "gptq",
    "higgs",
    "hqq",
    "mxfp4",
    "nf4",
    "nvfp4",
    "odyssey",
    "ohq",
    "ptq161",
    "pv_tuning",
    "quantease",
    "quarot",
    "rtn",
    "seedlm",
    "smoothquant",
    "smoothquant_plus",
    "spqr",
]


def rtn(
    bits: int = 4, group_size: int | None = 64, symmetric: bool = False, activation_bits: int | None = None
) -> _Recipe:
    """Round to nearest (arXiv:1712.05877): integer weights without calibration data; every other solver must beat it.

    With `activation_bits=8` inputs are rounded as well, in groups of each token, and products are those of integers: faster on
    a CPU.
    """
    activation = None if activation_bits is None else _IntActivation(activation_bits, group_size)
    return _Recipe(grid=_IntGrid(bits, group_size, symmetric), solver=_RTN(), activation=activation)


def gptq(
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    order: _Literal["act", "none", "group"] = "act",
    damp: float = 0.01,
    activation_bits: int | None = None,
) -> _Recipe:
    """GPTQ (arXiv:2210.17323): rounds column by column and lets later columns make up for the errors of earlier ones.

    Adds the solver `GPTQ`; grid and `activation_bits` are those of `rtn`. `order="none"` is the paper's algorithm 1; rounding
    the columns with the largest inputs first, as the authors' code can, loses less on every model tried.
    """
    return _replace(rtn(bits, group_size, symmetric, activation_bits), solver=_GPTQ(damp, order))


def quantease(bits: int = 4, group_size: int | None = 64, sweeps: int = 3) -> _Recipe:
    """QuantEase (arXiv:2309.01885): after GPTQ, goes over the columns again and again, each given all the others.

    Adds the solver `CoordinateDescent`.
    """
    return _replace(rtn(bits, group_size), solver=_CoordinateDescent(_GPTQ(), sweeps))


def awq(bits: int = 4, group_size: int | None = 64) -> _Recipe:
    """AWQ (arXiv:2306.00978): scales up the channels with large inputs, so that they lose less; then searches clips.

    Adds the transform `ActScale`; unlike the authors' code, ranges are searched for q and k as well.
    """
    return _Recipe(_IntGrid(bits, group_size), _ClipSearch("diagonal", smallest=0.5, steps=20), (_ActScale(),))


def hqq(bits: int = 4, group_size: int | None = 64) -> _Recipe:
    """HQQ (https://mobiusml.github.io/hqq_blog/): finds zero points that fit most weights and forgives the outliers.

    Adds the solver `HQQ`; needs no data, and its zero points are float16.
    """
    return _Recipe(_IntGrid(bits, group_size, float_zero=True), _HQQ())


def nf4(group_size: int = 64) -> _Recipe:
    """NF4 (arXiv:2305.14314): quantiles of a normal distribution, their scales quantised once more: 4.127 bits."""
    return _Recipe(_DoubleNormalFloatGrid(group_size))


def fp8(group_size: int | None = None, rows: int | None = 1) -> _Recipe:
    """FP8 (arXiv:2209.05433): e4m3 with a scale per row; `rows=None` per tensor, `group_size=128, rows=128` per block."""
    return _Recipe(_FloatGrid("e4m3", group_size, rows))


def mxfp4(rule: _Literal["even", "floor"] = "even") -> _Recipe:
    """MXFP4 (arXiv:2310.10537): e2m1 times a power of two per 32 weights: 4.25 bits.

    `rule="floor"` is that of the OCP specification, which cuts the largest weights off.
    """
    return _Recipe(_MXFP4Grid(rule))


def nvfp4() -> _Recipe:
    """NVFP4 (arXiv:2509.25149): e2m1 times e4m3 per 16 weights, times one number per layer: 4.5 bits."""
    return _Recipe(_NVFP4Grid())


def higgs(n: int = 256, group_size: int = 128) -> _Recipe:
    """HIGGS (arXiv:2411.17525): a Hadamard transform makes weights normal, a grid for pairs of them then loses least.

    Adds `GaussianPairGrid` of n points: log2(n) / 2 bits. Needs no data. Which layers get how many bits by the paper's
    theorem is the allocation `DynamicProgram(Linearity(...))`.
    """
    return _Recipe(_GaussianPairGrid(n, group_size), transforms=(_Hadamard(block_size=group_size),))


def spqr(bits: int = 3, group_size: int = 16, tau: float = 0.5) -> _Recipe:
    """SpQR (arXiv:2306.03078): small groups whose scales are quantised too, and outliers kept beside the grid.

    Adds `BilevelInt`, the solver `SpQR` and `SparseOutliers`. The authors' tau of .2 keeps more outliers than are worth
    their bits in models without heavy tails. Fewer bits make more outliers of the same tau: on tiny-lm, at 2 bits
    in groups of 16, those of .5 take 1.1 bits per weight.
    """
    return _Recipe(_BilevelInt(bits, group_size), _SpQR(tau), compensation=_SparseOutliers())


def bitstack(blocks: int = 16, rank: int = 16) -> _Recipe:
    """BitStack (arXiv:2410.23918): weights as a stack of blocks of about a bit, of which memory holds as many as it can.

    Adds `SignLowRankStack` and the solver `WeightedRTN`. Of rank 16 a block is 1.5 bits per weight in layers some
    1000 wide, 1.1 in those of 4000; for smaller layers take 4 to 8. `StackOrder` finds which blocks go first, and
    `load_stack` (in `tersor.quant.elastic`) loads as many as there is memory for. On tiny-lm it beats `rtn` at 2.2 bits (KL
    .49, not .71), but not at 3.3 (.18, not .09), and `gptq` at neither.
    """
    return _Recipe(_SignLowRankStack(blocks, rank), _WeightedRTN())


def seedlm(block: int = 8, num_coefficients: int = 3, seed_bits: int = 16) -> _Recipe:
    """SeedLM (arXiv:2410.10714): weights as seeds of pseudo-random matrices; 4 bits, or 3 with blocks of 12 and 4."""
    return _Recipe(_SeedGrid(block, num_coefficients, seed_bits))


def eora(bits: int = 3, group_size: int | None = 64, rank: int = 32) -> _Recipe:
    """EoRA (arXiv:2410.21271): GPTQ, and beside it the low-rank matrix that makes up for most of its outputs' error."""
    return _replace(gptq(bits, group_size), compensation=_LowRank(rank))


def smoothquant(alpha: float = 0.5, percentile: float = 100.0, static: bool = False) -> _Recipe:
    """SmoothQuant (arXiv:2211.10438): 8-bit weights and inputs, after the inputs' outliers were shared with the weights.

    Adds the transform `Smooth`; products are those of integers. `static`: one scale per layer for its inputs, from the
    calibration data (the paper's O3), not one for each token (O1).
    """
    grid = _IntGrid(8, None, symmetric=True, restricted=True)
    return _Recipe(grid, transforms=(_Smooth(alpha, percentile),), activation=_eight_bits(static))


def dgq(group_size: int = 128, quantile: float = 0.995, static: bool = False) -> _Recipe:
    """DGQ (arXiv:2310.04836): 4-bit weights in groups whose scales are integers, 8-bit inputs, products of integers.

    Adds `DualGrain`, the solver `DualGrainSearch` and `PercentileSmooth`. `static` as in `smoothquant`.
    """
    smooth = _PercentileSmooth(quantile)
    return _Recipe(_DualGrain(group_size), _DualGrainSearch(), (smooth,), _eight_bits(static))


def odyssey(steps: int = 200) -> _Recipe:
    """OdysseyLLM (arXiv:2311.09550): 4-bit weights with one scale per row, 8-bit inputs: learned ranges, then GPTQ.

    Adds the transform `LearnedRange`; products are those of integers, by the paper's kernel. Without groups small models
    lose much: `dgq` is safer.
    """
    grid = _IntGrid(4, None, symmetric=True)
    return _Recipe(grid, _GPTQ(), (_LearnedRange(steps),), _IntActivation(8))


def comet(group_size: int = 128, tau: float = 10.0) -> _Recipe:
    """COMET (arXiv:2410.12168): 4-bit weights; inputs of 4 bits, in the few blocks of channels that hold outliers 8.

    Adds `BlockMixedActivation`, and `PermuteResidual` and `PermuteIntermediate`, which gather the outliers. What it does to a
    model is real, the speed is not (see `BlockMixedActivation`); its cache of 4 bits is a matter of `tersor.kvcache`.
    """
    grid = _IntGrid(4, group_size, symmetric=True)
    transforms = (_PermuteResidual(), _PermuteIntermediate())
    return _Recipe(grid, transforms=transforms, activation=_BlockMixedActivation(group_size, tau=tau))


def smoothquant_plus(bits: int = 4, group_size: int | None = 128) -> _Recipe:
    """SmoothQuant+ (arXiv:2312.03788): 4-bit weights after smoothing with the one strength that suits the model best.

    Where inputs have no outliers it is `rtn`: on tiny-lm no strength helps at 3 bits, at 2 KL goes from .71 to .69.
    """
    return _Recipe(_IntGrid(bits, group_size), transforms=(_SearchedSmooth(),))


def quarot(
    bits: int = 4,
    group_size: int | None = None,
    activation_bits: int | None = 4,
    seed: int = 0,
    symmetric: bool = True,
) -> _Recipe:
    """QuaRot (arXiv:2404.00456): Hadamard rotations, folded where they can be, leave no outliers; then GPTQ.

    R1, R2 and R4 of the paper; R3 is for the KV cache. `activation_bits=None` quantises weights only. Models whose norms
    stand behind a branch (Gemma) take `Hadamard()`, the same at run time, in place of R1. For weights alone, `symmetric=False`
    loses less: tiny-lm at 2 bits in groups of 64 diverges by .144, not .179, and by .165 with GPTQ alone.
    """
    rotations = (_RotateResidual(seed), _RotateHeads(), _Hadamard(seed=seed, layers=("down_proj",)))
    activation = None if activation_bits is None else _IntActivation(activation_bits, clip=0.9)
    # At 2 bits clipped ranges lower the error of each layer of tiny-lm (.021 on average, not .037), but raise the divergence of
    # the model (.248, not .179); at 3 bits they change little, per row at 4 they help (.055, not .057).
    clip = _ClipSearch("diagonal") if bits > 2 else None
    return _Recipe(_IntGrid(bits, group_size, symmetric), _GPTQ(clip=clip), rotations, activation)


def butterflyquant(bits: int = 2, group_size: int | None = 128, steps: int = 200) -> _Recipe:
    """ButterflyQuant (arXiv:2509.09679): like a Hadamard transform, but of rotations that are learnt for each layer.

    Adds the transform `Butterfly`.
    """
    return _Recipe(_IntGrid(bits, group_size), transforms=(_Butterfly(steps),))


def evopress(bits: int = 3, group_size: int | None = 64, search: _Evolution = _Evolution()) -> _Recipe:
    """EvoPress (arXiv:2410.14649): GPTQ with one bit less in some layers and one more in others, of the same size in all.

    What the whole model makes of an allocation decides. `Evolution()` is the paper's search, for GPUs: some 10^8 tokens
    run through the model; fewer generations and offspring do much of it (see its tests).
    """
    allocation = _MixedGrids(_around(bits, group_size), search)
    return _Recipe(_IntGrid(bits, group_size), _GPTQ(), allocation=allocation)


def calibtip(bits: int = 4, group_size: int | None = 64) -> _Recipe:
    """CalibTIP (arXiv:2006.10518): rounding learnt layer by layer (AdaQuant), and bits that an integer program chooses.

    Each layer's loss is that of the model with this layer alone quantised, all layers cost together what `bits` would.
    The paper's tuning of batch norms and biases afterwards, which language models hardly have, is left out; scales stay too.
    """
    allocation = _MixedGrids(_around(bits, group_size), _IntegerProgram(_LayerDivergence()))
    return _Recipe(_IntGrid(bits, group_size), _LearnedRounding(), allocation=allocation)


def ohq(bits: int = 4, group_size: int | None = 64) -> _Recipe:
    """OHQ (arXiv:2309.01945): bits that take, in all layers together, the time that `bits` would on this machine.

    Measured when the model is quantised: with as many threads as will run it.
    """
    allocation = _MixedGrids(_around(bits, group_size), _IntegerProgram(_MaskSensitivity(), _MeasuredCost()))
    return _Recipe(_IntGrid(bits, group_size), allocation=allocation)


def brecq(bits: int = 3, group_size: int | None = 64, steps: int = 500) -> _Recipe:
    """BRECQ (arXiv:2102.05426): chooses between the two nearest levels of a weight by what its whole block puts out.

    Adds the tuning `BlockReconstruction`.
    """
    return _replace(rtn(bits, group_size), tuning=(_BlockReconstruction(steps),))


def ptq161(
    salient: float = 0.2, salient_bits: int = 4, steps: int = 200, restorative_steps: int | None = None
) -> _Recipe:
    """PTQ1.61 (arXiv:2502.13179): a bit per weight, four for the inputs that matter most; scales learnt block by block.

    Adds `MaskedBinary` and the tuning `BlockScales`; inputs are salient by their mean squares. `restorative_steps` adds
    the paper's preprocessing, `RestorativePreprocess`: all is done twice, and between that many steps of the whole model.
    """
    once = _Recipe(_MaskedBinary(salient, salient_bits), _WeightedRTN(), tuning=(_BlockScales(steps),))
    if restorative_steps is None:
        return once
    return _replace(once, tuning=(*once.tuning, _RestorativePreprocess(once, steps=restorative_steps)))


def dbllm(group_size: int | None = 64, gamma: float = 0.1, steps: int = 200) -> _Recipe:
    """DB-LLM (arXiv:2402.11960): weights as two binary matrices, whose scales learn from what the model predicted.

    Adds `DualBinary` and the tuning `DeviationAware`; scales start from a clip search, not from the largest weights. It
    learns from the calibration data, where the paper has text that the model itself has written.
    """
    return _Recipe(_DualBinary(group_size), _ClipSearch(), tuning=(_DeviationAware(gamma, steps),))


def aqlm(
    num_codebooks: int = 2,
    codebook_bits: int = 8,
    vector_size: int = 8,
    steps: int = 100,
    tolerance: float = 0.01,
) -> _Recipe:
    """AQLM (arXiv:2401.06118): weights as sums of vectors from codebooks, found by beam search and tuned block by block.

    Adds `AdditiveGrid`, the solver `BeamSearch` and the tuning `BlockMSE` of so many `steps`. 2x8 are 2 bits per weight,
    besides codebooks that only layers of thousands of channels make up for. A larger `tolerance` ends searches earlier.
    """
    grid = _AdditiveGrid(num_codebooks, codebook_bits, vector_size)
    return _Recipe(grid, _BeamSearch(tolerance=tolerance), tuning=(_BlockMSE(steps, target="inputs"),))


def pv_tuning(
    num_codebooks: int = 1,
    codebook_bits: int = 8,
    vector_size: int = 8,
    steps: int = 100,
    tolerance: float = 0.01,
) -> _Recipe:
    """PV-Tuning (arXiv:2405.14852): AQLM whose codes too are learnt, with all blocks together, from the original model.

    Adds the tuning `PV` of so many `steps`, which takes any grid. Wants text, and much of it: from 8192 tokens, 50 steps take
    tiny-lm's divergence on other text from .233 to .172 at 1.6 bits, but from .086 to .124 at 2, and at 3 and 4 find nothing
    better. With codes left alone at 2 bits, `aqlm` and `PV(40, rate=2e-3, max_code_change=0.0)`, .073.
    """
    start = aqlm(num_codebooks, codebook_bits, vector_size, steps, tolerance)
    return _replace(start, tuning=(*start.tuning, _PV(steps)))


def abq(bits: int = 2, activation_bits: int | None = 8, group_size: int | None = None, epochs: int = 20) -> _Recipe:
    """ABQ-LLM (arXiv:2408.08554): any widths of weights and inputs, of bit planes, after a correction learnt by gradients.

    Adds `DistributionCorrection`, `PlaneActivation` and `BitBalance`: what is called 1 and 2 bits has a level more, and
    takes 1.6 and 2.33.
    """
    grid = _BitBalance(3 if bits == 1 else 5, group_size) if bits <= 2 else _IntGrid(bits, group_size)
    activation = None if activation_bits is None else _PlaneActivation(activation_bits)
    return _Recipe(grid, transforms=(_DistributionCorrection(activation, epochs),), activation=activation)


def bipolar_int(bits: int = 4, activation_bits: int | None = 8, group_size: int | None = 64) -> _Recipe:
    """Bipolar-INT (arXiv:2409.17870): odd integers of any width on both sides, whose bit planes need no zero points.

    Adds `BipolarInt` and `BipolarActivation`. Ranges are searched: with no zero, half a step more or less is felt. In inputs,
    most of them near zero, it is felt most: of 4 bits they leave tiny-lm a divergence of 1.2, those of `IntActivation` .14.
    """
    activation = None if activation_bits is None else _BipolarActivation(activation_bits)
    return _Recipe(_BipolarInt(bits, group_size), _ClipSearch(), activation=activation)


def _around(bits: int, group_size: int | None) -> tuple[_IntGrid, ...]:
    if not 2 <= bits <= 7:
        raise ValueError(f"bits must be 2 to 7, so that some layers can have less and others more, got {bits}")
    return tuple(_IntGrid(some, group_size) for some in (bits - 1, bits, bits + 1))


def _eight_bits(static: bool) -> _IntActivation | _StaticActivation:
    return _StaticActivation(8) if static else _IntActivation(8)
