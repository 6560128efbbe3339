"""Byte planes on the GPU: one thread per number."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.planes import word_dtype

_BLOCK = 1024


def plane_split(x: Tensor) -> tuple[Tensor, Tensor] | Declined:
    if x.dtype.itemsize == 1:
        return Declined("types of one byte are copied")
    first = x.new_empty(x.shape, dtype=torch.uint8)
    rest = x.new_empty(x.dtype.itemsize - 1, *x.shape, dtype=torch.uint8)
    _run(_split, x.detach().contiguous().view(word_dtype(x.dtype)), first, rest)
    return first, rest


def plane_merge(first: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor | Declined:
    if dtype.itemsize == 1:
        return Declined("types of one byte are copied")
    word = first.new_empty(first.shape, dtype=word_dtype(dtype))
    _run(_merge, word, first.contiguous(), rest.contiguous())
    return word.view(dtype)


def _run(kernel, word: Tensor, first: Tensor, rest: Tensor) -> None:
    n = word.numel()
    if n:
        with torch.cuda.device_of(word):
            kernel[(triton.cdiv(n, _BLOCK),)](word, first, rest, n, 8 * word.itemsize, _BLOCK)


@triton.jit
def _split(words, first, rest, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + i, mask=i < n, other=0).to(tl.int32)
    rotated = (word << 1) | ((word >> (BITS - 1)) & 1)
    tl.store(first + i, ((rotated >> (BITS - 8)) & 255).to(tl.uint8), mask=i < n)
    for p in tl.static_range(1, BITS // 8):
        tl.store(rest + i, ((rotated >> (BITS - 8 - 8 * p)) & 255).to(tl.uint8), mask=i < n)
        rest += n


@triton.jit
def _merge(words, first, rest, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rotated = tl.load(first + i, mask=i < n, other=0).to(tl.int32)
    for _ in tl.static_range(1, BITS // 8):
        rotated = (rotated << 8) | tl.load(rest + i, mask=i < n, other=0).to(tl.int32)
        rest += n
    # integers are signed: the shift to the right drags the sign along
    word = (rotated << (BITS - 1)) | ((rotated >> 1) & ((1 << (BITS - 1)) - 1))
    tl.store(words + i, word.to(words.dtype.element_ty), mask=i < n)
