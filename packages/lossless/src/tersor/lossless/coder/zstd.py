"""Coders that write standard zstd frames (RFC 8878), by the `zstandard` library."""

from dataclasses import dataclass
from typing import ClassVar

import zstandard


@dataclass(frozen=True)
class Zstd:
    """zstd at one of its levels: repetitions first, then an entropy code of what is left.

    Source: https://github.com/facebook/zstd. Right for text; on weights, which do not repeat, `Huffman` is smaller.

    Args:
        level: 1 (fast) to 22 (small).
    """

    level: int = 3

    id: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise ValueError(f"level must be 1 to 22, got {self.level}")

    def encode(self, plane: memoryview) -> bytes:
        return zstandard.ZstdCompressor(level=self.level).compress(plane)

    @staticmethod
    def decode(stream: memoryview, n: int) -> bytes:
        try:
            # what the frame announces is allocated, so it must announce n
            if zstandard.get_frame_parameters(stream).content_size != n:
                raise ValueError(f"zstd frame does not announce {n} bytes")
            data = zstandard.ZstdDecompressor().decompress(stream, max_output_size=n, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if len(data) != n:
            raise ValueError(f"zstd frame of {len(data)} bytes, expected {n}")
        return data


@dataclass(frozen=True)
class Huffman:
    """zstd with hardly any search for repetitions: the Huffman code of its literals does the work.

    zstd renews the code every 128 KiB and limits it to 11 bits. Exponents have no repetitions beyond chance, and each
    one that zstd finds costs more than the code of its bytes: on Gaussian rows, entropy 2.64 bits per exponent, level 3
    takes 3.39, level 9 3.15, this coder 2.69 and an ideal Huffman code 2.67. With the smallest hash table (2^6)
    and the longest shortest match (7) it finds next to none of them, yet still the runs of zeros.
    """

    id: ClassVar[int] = Zstd.id
    decode = staticmethod(Zstd.decode)

    def encode(self, plane: memoryview) -> bytes:
        # target_length 0: with any other, the fast strategy stores its literals without a code
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=18,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(plane)
