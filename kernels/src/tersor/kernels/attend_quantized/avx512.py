"""Attention over codes in vectors of 512 bits: they become floats in registers, and scales go to the other factor.

Where all tokens of a tile share the scales of their channels (keys, as KIVI has them), queries take these; where each
token has scales of its own (values), attention weights do. Queries are taken four by four.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np

from tersor.kernels import simd, simd512
from tersor.kernels.cpu import jit

_f32 = np.float32


@jit()
def multiply(query, codes, stride, scale, minimum, logits, folded):
    """logits[r, t] = sum_j query[r, j] (codes[t, j] scale[j] + minimum[j]) for all tokens of a tile.

    Args:
        query: (rows, head_dim), rows a multiple of 4 and head_dim of 16.
        codes: address of bytes, `stride` for a token.
        scale, minimum: (head_dim,).
        logits: (rows, tokens), tokens a multiple of 4.
        folded: scratch, (4, head_dim).
    """
    num_tokens, head_dim, to = logits.shape[1], query.shape[1], np.int64(folded.ctypes.data)
    of_rows, scratch = 4 * head_dim, to + 16 * head_dim
    for r in range(0, query.shape[0], 4):
        for i in range(4):
            offset, at = simd512.zero(), np.int64(query.ctypes.data) + of_rows * (r + i)
            for j in range(0, of_rows, 64):
                q = simd512.load_f32(at + j)
                offset = simd512.fma(q, simd512.load_f32(np.int64(minimum.ctypes.data) + j), offset)
                q = simd512.mul(q, simd512.load_f32(np.int64(scale.ctypes.data) + j))
                simd512.store_f32(to + of_rows * i + j, q)
            for k in range(4):
                simd.set_float32(scratch + 16 * i + 4 * k, simd512.total(offset))
        offsets = simd512.load_f32(scratch)
        for t in range(0, num_tokens, 4):
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = simd512.zero()
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = simd512.zero()
            at = codes + stride * t
            for j in range(0, head_dim, 16):
                c0, c1 = simd512.load_u8_as_f32(at + j), simd512.load_u8_as_f32(at + stride + j)
                c2, c3 = simd512.load_u8_as_f32(at + 2 * stride + j), simd512.load_u8_as_f32(at + 3 * stride + j)
                q = simd512.load_f32(to + 4 * j)
                s00, s01, s02, s03 = _fma_4(q, c0, c1, c2, c3, s00, s01, s02, s03)
                q = simd512.load_f32(to + 4 * j + of_rows)
                s10, s11, s12, s13 = _fma_4(q, c0, c1, c2, c3, s10, s11, s12, s13)
                q = simd512.load_f32(to + 4 * j + 2 * of_rows)
                s20, s21, s22, s23 = _fma_4(q, c0, c1, c2, c3, s20, s21, s22, s23)
                q = simd512.load_f32(to + 4 * j + 3 * of_rows)
                s30, s31, s32, s33 = _fma_4(q, c0, c1, c2, c3, s30, s31, s32, s33)
            products = simd512.totals((s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33))
            simd512.store_f32(scratch, simd512.add(products, offsets))
            for i in range(4):
                for k in range(4):
                    logits[r + i, t + k] = simd.float32_at(scratch + 16 * i + 4 * k)


@jit()
def _fma_4(a, c0, c1, c2, c3, s0, s1, s2, s3):
    return simd512.fma(a, c0, s0), simd512.fma(a, c1, s1), simd512.fma(a, c2, s2), simd512.fma(a, c3, s3)


@jit()
def accumulate(weights, num_tokens, codes, stride, scale, minimum, out, folded):
    """out[r, j] += sum_t weights[r, t] (codes[t, j] scale[t, g] + minimum[t, g]), g the group of channel j.

    Args:
        weights: (rows, tile), rows a multiple of 4; the first `num_tokens` count.
        codes: address of bytes, `stride` for a token.
        scale, minimum: (num_tokens, groups), of at least 32 channels each, a multiple of 32.
        out: (rows, head_dim).
        folded: scratch, (6, tile).
    """
    groups, tile, to = scale.shape[1], weights.shape[1], np.int64(folded.ctypes.data)
    group_size, nbytes = out.shape[1] // scale.shape[1], 4 * weights.shape[1]
    target = np.int64(out.ctypes.data)
    for g in range(groups):
        for t in range(tile):
            folded[4, t] = scale[t, g] if t < num_tokens else _f32(0)
            folded[5, t] = minimum[t, g] if t < num_tokens else _f32(0)
        for r in range(0, out.shape[0], 4):
            o_0 = o_1 = o_2 = o_3 = simd512.zero()
            for t in range(0, nbytes, 64):
                s, m = simd512.load_f32(to + 4 * nbytes + t), simd512.load_f32(to + 5 * nbytes + t)
                at = np.int64(weights.ctypes.data) + nbytes * r + t
                w_0, w_1 = simd512.load_f32(at), simd512.load_f32(at + nbytes)
                w_2, w_3 = simd512.load_f32(at + 2 * nbytes), simd512.load_f32(at + 3 * nbytes)
                simd512.store_f32(to + t, simd512.mul(w_0, s))
                simd512.store_f32(to + nbytes + t, simd512.mul(w_1, s))
                simd512.store_f32(to + 2 * nbytes + t, simd512.mul(w_2, s))
                simd512.store_f32(to + 3 * nbytes + t, simd512.mul(w_3, s))
                o_0, o_1, o_2, o_3 = _fma_4(m, w_0, w_1, w_2, w_3, o_0, o_1, o_2, o_3)
            offset_0, offset_1 = simd512.splat(simd512.total(o_0)), simd512.splat(simd512.total(o_1))
            offset_2, offset_3 = simd512.splat(simd512.total(o_2)), simd512.splat(simd512.total(o_3))
            for j in range(g * group_size, (g + 1) * group_size, 32):
                s00 = s10 = offset_0
                s01 = s11 = offset_1
                s02 = s12 = offset_2
                s03 = s13 = offset_3
                for t in range(num_tokens):
                    at = codes + stride * t + j
                    c0, c1 = simd512.load_u8_as_f32(at), simd512.load_u8_as_f32(at + 16)
                    w_0, w_1 = _splat_at(to + 4 * t), _splat_at(to + nbytes + 4 * t)
                    w_2, w_3 = _splat_at(to + 2 * nbytes + 4 * t), _splat_at(to + 3 * nbytes + 4 * t)
                    s00, s01, s02, s03 = _fma_4(c0, w_0, w_1, w_2, w_3, s00, s01, s02, s03)
                    s10, s11, s12, s13 = _fma_4(c1, w_0, w_1, w_2, w_3, s10, s11, s12, s13)
                row, nbytes_of_row = target + 4 * (r * out.shape[1] + j), 4 * out.shape[1]
                _add_to(row, s00, s10)
                _add_to(row + nbytes_of_row, s01, s11)
                _add_to(row + 2 * nbytes_of_row, s02, s12)
                _add_to(row + 3 * nbytes_of_row, s03, s13)


@jit()
def _splat_at(address):
    return simd512.splat(simd.float32_at(address))


@jit()
def _add_to(address, low, high):
    simd512.store_f32(address, simd512.add(simd512.load_f32(address), low))
    simd512.store_f32(address + 64, simd512.add(simd512.load_f32(address + 64), high))
