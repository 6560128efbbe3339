"""Shared ops of tersor: one name, one meaning, up to three bodies.

    hadamard         orthonormal Walsh-Hadamard transform of the last dimension
    pack_bits        codes of 1 to 8 bits -> bytes
    unpack_bits      and back
    dequant_matmul   x @ ((codes - zero_point) * scale).T from packed codes

`backend` forces a body, `explain` names the one that runs.
"""

from tersor.kernels.bits import pack_bits, unpack_bits
from tersor.kernels.dequant_matmul import dequant_matmul
from tersor.kernels.dispatch import backend, explain
from tersor.kernels.hadamard import hadamard

__all__ = ["backend", "dequant_matmul", "explain", "hadamard", "pack_bits", "unpack_bits"]
