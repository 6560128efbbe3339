"""What the CPU bodies share: how Numba compiles them, how many threads they use, how they see tensors.

Conventions of the bodies: a plain function works on a range of rows and holds the GIL; a `parallel` one cuts the rows
into as many ranges as there are threads. Small integers are cast back to int32 after every step, because Numba
promotes them to int64, which halves the speed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor


def jit(**options: Any) -> Callable[[Callable], Any]:
    """`numba.njit`, compiled once per machine where there is a folder to keep the machine code in."""

    def compile_later(function: Callable) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither the package nor the home folder is writable
            return njit(**options)(function)

    return compile_later


# sums may be reordered (else no vector code), but NaN and infinity stay what they are
REORDER = {"reassoc", "contract", "nsz", "arcp"}


def num_threads(nbytes: int) -> int:
    """Threads for a pass over `nbytes`: torch's setting, or 1 where starting a thread costs more than it brings."""
    return torch.get_num_threads() if nbytes >= 2**17 else 1


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


# a lane for each of the 8 bytes in a word
BYTE_LANES = np.uint64(0x0101010101010101)


def words(c: int, *rows: Tensor) -> tuple[np.uint64, *tuple[np.ndarray, ...]]:
    """Lanes, and rows of planes (multiples of `c` bytes) as words of 8 bytes, or as bytes if 8 does not divide `c`.

    Shifts and masks of codes never cross a byte, so that one kernel serves both.
    """
    arrays = [array(tensor) for tensor in rows]
    # a slice of a larger tensor may start at an odd address
    if c % 8 == 0 and not any(tensor.data_ptr() % 8 for tensor in rows):
        return BYTE_LANES, *[a.view(np.uint64) for a in arrays]
    return np.uint64(1), *arrays
