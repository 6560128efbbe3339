"""Published systems as choices of pieces."""

from .coder import Huffman as _Huffman
from .coder import Zstd as _Zstd
from .container import Frames as _Frames
from .layout import ExponentSplit as _ExponentSplit
from .layout import Raw as _Raw
from .recipe import Recipe as _Recipe

__all__ = ["zipnn", "zstd"]


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


def zstd(level: int = 3) -> _Recipe:
    """Zstandard (https://github.com/facebook/zstd): the bytes as they are in blocks of 4 MiB. The baseline.

    Differs from `zstd FILE`: every tensor is coded by itself, so that it can be read alone.

    Args:
        level: 1 (fast) to 22 (small).
    """
    return _Recipe(_Raw(), _Zstd(level), _Frames(block_log2=22, files_coder=_Zstd(level)))
