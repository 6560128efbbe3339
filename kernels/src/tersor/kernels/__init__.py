"""Shared ops of tersor: one name, one meaning, up to three bodies.

Transforms and packing
    hadamard                orthonormal Walsh-Hadamard transform of the last dimension
    butterfly               learnable orthogonal transform of Givens rotations
    pack_bits, unpack_bits  codes of 1 to 8 bits -> bytes, and back

Linear
    dequant_matmul          x @ ((codes - zero_point) * scale).T from packed codes
    lookup_linear           x @ (codebook[codes] * scale).T from packed codes
    int8_linear             x @ W.T with W of int8
    w8a8_linear             the same with x of int8
    w4a8_linear             x @ W.T with x of int8 and W of integers in 4 bits, in groups with integer scales or not
    wna8_linear             x @ W.T with x of int8 and codes of 1 to 8 bits in groups; quantize_per_token rounds x
    bitplane_linear         the same with codes of 1 to 8 bits on both sides; bit_planes cuts them into planes
    bipolar_linear          the same with odd integers
    vector_codebook_linear  x @ W.T with W a sum of vectors of codebooks
    compressed_linear       x @ W.T with W losslessly compressed; compressed_weight makes it
    add_low_rank            y + x @ down @ up

Attention
    attend_quantized        a few queries over packed keys and values -> (output, lse)
    merge_attention         attention over all keys from attention over parts of them
    received_attention      what each key receives: column sums of the attention matrix, without the matrix
    tree_attention          a draft tree's nodes over the cache and their ancestors -> (output, lse); ancestor_mask(parents)

Selection
    gather_tokens           tokens picked by index, per row of the batch
    merge_tokens            tokens averaged into fewer, weighted by size
    bipartite_match         for each token the most similar one of another set
    topk_mask               True at the k largest of each row
    weighted_sum            sum of stored features with weights

Coding
    plane_split, plane_merge                   floats <-> bytes of exponents and of the rest
    tiered_encode, tiered_decode               two bit planes and rare escapes: for run time
    fixed_planes_encode, fixed_planes_decode   bit planes, and whole bytes for what lies outside
    prefix6_encode, prefix6_decode             Huffman codes of at most 6 bits: for storage
    rans11_encode, rans11_decode               range ANS, 64 states: smallest

`backend` forces a body, `explain` names the one that runs.
"""

from tersor.kernels.add_low_rank import add_low_rank
from tersor.kernels.attend_quantized import attend_quantized
from tersor.kernels.bipartite_match import bipartite_match
from tersor.kernels.bitplane_linear import bipolar_linear, bit_planes, bitplane_linear
from tersor.kernels.bits import pack_bits, unpack_bits
from tersor.kernels.butterfly import butterfly
from tersor.kernels.compressed_linear import compressed_linear, compressed_weight
from tersor.kernels.dequant_matmul import dequant_matmul
from tersor.kernels.dispatch import backend, explain
from tersor.kernels.fixed_planes import fixed_planes_decode, fixed_planes_encode
from tersor.kernels.gather_tokens import gather_tokens
from tersor.kernels.hadamard import hadamard
from tersor.kernels.int8_linear import int8_linear, w8a8_linear
from tersor.kernels.lookup_linear import lookup_linear
from tersor.kernels.merge_attention import merge_attention
from tersor.kernels.merge_tokens import merge_tokens
from tersor.kernels.planes import plane_merge, plane_split
from tersor.kernels.prefix6 import prefix6_decode, prefix6_encode
from tersor.kernels.quantize_per_token import quantize_per_token
from tersor.kernels.rans11 import rans11_decode, rans11_encode
from tersor.kernels.received_attention import received_attention
from tersor.kernels.tiered import tiered_decode, tiered_encode, tiered_offsets
from tersor.kernels.topk_mask import topk_mask
from tersor.kernels.tree_attention import ancestor_mask, tree_attention
from tersor.kernels.vector_codebook_linear import vector_codebook_linear
from tersor.kernels.w4a8_linear import w4a8_linear
from tersor.kernels.weighted_sum import weighted_sum
from tersor.kernels.wna8_linear import wna8_linear

__all__ = [
    "add_low_rank",
    "ancestor_mask",
    "attend_quantized",
    "backend",
    "bipartite_match",
    "bipolar_linear",
    "bit_planes",
    "bitplane_linear",
    "butterfly",
    "compressed_linear",
    "compressed_weight",
    "dequant_matmul",
    "explain",
    "fixed_planes_decode",
    "fixed_planes_encode",
    "gather_tokens",
    "hadamard",
    "int8_linear",
    "lookup_linear",
    "merge_attention",
    "merge_tokens",
    "pack_bits",
    "plane_merge",
    "plane_split",
    "prefix6_decode",
    "prefix6_encode",
    "quantize_per_token",
    "rans11_decode",
    "rans11_encode",
    "received_attention",
    "tiered_decode",
    "tiered_encode",
    "tiered_offsets",
    "topk_mask",
    "tree_attention",
    "unpack_bits",
    "vector_codebook_linear",
    "w4a8_linear",
    "w8a8_linear",
    "weighted_sum",
    "wna8_linear",
]
