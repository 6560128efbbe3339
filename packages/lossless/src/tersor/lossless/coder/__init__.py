"""Coders: a plane of bytes to fewer bytes. `id` is the number by which the file names the decoder."""

from .stored import Stored
from .zstd import Huffman, Zstd

__all__ = ["Huffman", "Stored", "Zstd"]

# the file names formats, not coders: Huffman writes the frames of Zstd
DECODERS = {coder.id: coder.decode for coder in (Stored, Zstd)}
