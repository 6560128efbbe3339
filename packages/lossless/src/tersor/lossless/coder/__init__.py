"""Coders: a plane of bytes to fewer bytes. `id` is the number by which the file names the decoder."""

from .order0 import FixedPlanes, Prefix6, Rans11, Tiered
from .stored import Stored
from .zstd import Huffman, Zstd

__all__ = ["FixedPlanes", "Huffman", "Prefix6", "Rans11", "Stored", "Tiered", "Zstd"]

# the file names formats, not coders: Huffman writes the frames of Zstd
DECODERS = {coder.id: coder.decode for coder in (Stored, Zstd, Rans11, Prefix6, Tiered, FixedPlanes)}
