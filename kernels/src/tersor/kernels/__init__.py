"""Shared ops of tersor: one name, one meaning, up to three bodies."""

from tersor.kernels.bits import pack_bits, unpack_bits
from tersor.kernels.dequant_matmul import dequant_matmul
from tersor.kernels.hadamard import hadamard

__all__ = ["dequant_matmul", "hadamard", "pack_bits", "unpack_bits"]
