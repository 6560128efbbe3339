"""Published systems as choices of pieces."""

from .coder import Huffman as _Huffman
from .coder import Prefix6 as _Prefix6
from .coder import Rans11 as _Rans11
from .coder import Zstd as _Zstd
from .container import Frames as _Frames
from .layout import ExponentSplit as _ExponentSplit
from .layout import Raw as _Raw
from .recipe import Recipe as _Recipe

__all__ = ["dfloat11", "neuzip", "zipnn", "zstd"]


def zipnn(block_log2: int = 18) -> _Recipe:
    """ZipNN (arXiv:2411.05239): exponents and mantissas apart, each coded without looking for repetitions.

    Differs from the authors' code: dtypes are the tensors' own; float16 is rotated as well; a plane is kept coded
    whenever that is smaller (theirs: below 95 %), since zstd gives up on a hopeless one by itself; blocks are of 2^18
    elements (theirs: 256 KiB); the packed file opens tensor by tensor and restores the files byte by byte. Deltas of
    two models, their other mode, are not here.

    Args:
        block_log2: a block has 2^block_log2 weights.
    """
    return _Recipe(_ExponentSplit(), _Huffman(), _Frames(block_log2))


def dfloat11(block_log2: int = 18) -> _Recipe:
    """DFloat11 (arXiv:2504.11651): a Huffman code of the exponents, sign and mantissa as they are.

    Differs from the authors' code: codes of at most 6 bits and an escape (theirs: 32 bits), so that a decoder's table is
    one register; a code for each block of 2^block_log2 weights (theirs: for a transformer block); all dtypes. This is
    the form on disk: weights that stay compressed at run time, their main job, are not here.

    Args:
        block_log2: a block has 2^block_log2 weights.
    """
    return _Recipe(_ExponentSplit(), _Prefix6(), _Frames(block_log2))


def neuzip(block_log2: int = 16) -> _Recipe:
    """NeuZip (arXiv:2410.20650): exponents by asymmetric numeral systems, sign and mantissa as they are.

    Differs from the authors' code: theirs is for bfloat16, this codes planes of all dtypes where that saves 1 %. This is
    the lossless form on disk: training on compressed weights and shortened mantissas are not here.

    Args:
        block_log2: a block has 2^block_log2 weights.
    """
    return _Recipe(_ExponentSplit(), _Rans11(), _Frames(block_log2))


def zstd(level: int = 3) -> _Recipe:
    """Zstandard (https://github.com/facebook/zstd): the bytes as they are in blocks of 4 MiB. The baseline.

    Differs from `zstd FILE`: every tensor is coded by itself, so that it can be read alone.

    Args:
        level: 1 (fast) to 22 (small).
    """
    return _Recipe(_Raw(), _Zstd(level), _Frames(block_log2=22, files_coder=_Zstd(level)))
