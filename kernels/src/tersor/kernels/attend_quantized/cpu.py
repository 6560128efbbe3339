"""Attention over packed codes on the CPU: a tile of tokens is decoded once, in the first-level cache, for all queries.

Indices are unsigned: Numba then leaves out the wrap-around of negative ones, and LLVM finds the vector code.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd512
from tersor.kernels.attend_quantized import avx512
from tersor.kernels.cpu import REORDER, array, jit, num_threads, words
from tersor.kernels.dispatch import Declined
from tersor.kernels.merge_attention import merge_attention

_f32, _i32, _u64 = np.float32, np.int32, np.uint64

# tokens decoded at a time, a multiple of 8: 16 KB at 128 channels
_TILE = 32
# a part shorter than this is not worth a thread of its own
_MIN_PART = 256
# not -inf, from which exp(x - running maximum) would be NaN
_LOWEST = np.finfo(np.float32).min


def attend_quantized(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    key_bits: int,
    value_bits: int,
    key_token_group: int = 1,
    value_token_group: int = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | Declined:
    if query.dtype == torch.float64:
        return Declined("float64")
    batch, num_heads, num_queries, head_dim = query.shape
    num_key_value_heads, seq_len = key[0].shape[1:3]
    heads, rows = batch * num_key_value_heads, num_heads // num_key_value_heads * num_queries
    threads = num_threads(rows * seq_len * head_dim)
    parts = max(1, min(-(-threads // max(heads, 1)), seq_len // _MIN_PART))
    output = torch.zeros(parts, heads, rows, head_dim, dtype=torch.float32)
    lse = torch.full((parts, heads, rows), -torch.inf, dtype=torch.float32)
    if output.numel() and seq_len:
        q = query.float() * (head_dim**-0.5 if scale is None else scale)
        logit_bias = torch.zeros(1, 1, 0, dtype=torch.float32) if bias is None else bias.float().contiguous()
        in_place = _in_place(key, value, key_token_group, value_token_group, rows, head_dim)
        lanes, key_codes, value_codes = words((head_dim + 7) // 8, *(_per_head(t[0]) for t in (key, value)))
        arguments = (
            array(q.reshape(heads, rows, head_dim).contiguous()),
            (lanes, key_codes, *_grid(key), key_bits, key_token_group),
            (lanes, value_codes, *_grid(value), value_bits, value_token_group),
            array(logit_bias),
            num_key_value_heads,
            array(output),
            array(lse),
            *in_place,
        )
        if threads == 1:
            _attend(*arguments, 0, parts * heads)
        else:
            _attend_in_parallel(*arguments, threads)
    merged, total = (output[0], lse[0]) if parts == 1 else merge_attention(output, lse)
    return merged.to(query.dtype).view(query.shape), total.view(query.shape[:3])


def _in_place(key, value, key_token_group, value_token_group, rows, head_dim) -> tuple[bool | None, bool | None]:
    """Whether keys, and values, are multiplied as codes: True, or None, for which Numba compiles another function."""
    if rows % 4 or head_dim % 32 or not simd512.available():
        return None, None
    key_groups, value_groups = (t[1].flatten(3).shape[3] for t in (key, value))
    # tokens of a tile share the grids of keys; each has its own of values, for whole vectors
    keys = key_token_group % _TILE == 0 and key_groups == head_dim
    values = value_token_group == 1 and head_dim // value_groups % 32 == 0
    return True if keys else None, True if values else None


def _per_head(t: Tensor) -> Tensor:
    """(heads, tokens or groups of them, bytes or groups of channels)"""
    return t.flatten(0, 1).flatten(2).contiguous()


def _grid(stream: list[Tensor]) -> list[np.ndarray]:
    return [array(_per_head(t).float()) for t in stream[1:]]


@jit(parallel=True)
def _attend_in_parallel(
    query, keys, values, bias, num_key_value_heads, output, lse, keys_in_place, values_in_place, threads
):
    tasks = output.shape[0] * output.shape[1]
    for i in prange(threads):
        start, stop = i * tasks // threads, (i + 1) * tasks // threads
        _attend(
            query,
            keys,
            values,
            bias,
            num_key_value_heads,
            output,
            lse,
            keys_in_place,
            values_in_place,
            start,
            stop,
        )


@jit()
def _attend(query, keys, values, bias, num_key_value_heads, output, lse, keys_in_place, values_in_place, start, stop):
    parts, heads, rows, head_dim = output.shape
    seq_len = keys[1].shape[1]
    tile = np.empty((_TILE, head_dim), np.float32)
    codes = np.empty((_TILE, -(-head_dim // 8) * 8 // keys[1].itemsize), keys[1].dtype)
    weights = np.empty((rows, _TILE), np.float32)
    powers = np.empty(_TILE, np.int32)
    of_keys, of_values = np.empty((5, head_dim), np.float32), np.empty((6, _TILE), np.float32)
    at, stride = np.int64(codes.ctypes.data), np.int64(codes.shape[1] * codes.itemsize)
    tiles = -(-seq_len // _TILE)
    largest, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for task in range(start, stop):
        part, head = task // heads, task % heads
        out = output[part, head]
        for r in range(rows):
            largest[r], total[r] = _LOWEST, 0
        end = min((part + 1) * tiles // parts * _TILE, seq_len)
        for first in range(part * tiles // parts * _TILE, end, _TILE):
            n = min(_TILE, end - first)
            # first the keys, then the values: one call of `_unpack`, for LLVM would copy it to both places
            for values_next in range(2):
                stream = values if values_next else keys
                _unpack(stream[1][head], stream[0], stream[4], first, n, codes)
                if values_next:
                    if values_in_place is not None:
                        scale, minimum = stream[2][head, first : first + n], stream[3][head, first : first + n]
                        avx512.accumulate(weights, n, at, stride, scale, minimum, out, of_values)
                    else:
                        _decode(stream, head, first, n, codes, tile)
                        _accumulate(weights, tile, out)
                else:
                    if keys_in_place is not None:
                        scale, minimum = stream[2][head, first // stream[5]], stream[3][head, first // stream[5]]
                        avx512.multiply(query[head], at, stride, scale, minimum, weights, of_keys)
                    else:
                        _decode(stream, head, first, n, codes, tile)
                        _multiply(query[head], tile, weights)
                    _add(bias, head // num_key_value_heads, head % num_key_value_heads, first, n, weights)
                    _softmax(weights, n, largest, total, out, powers)
        _divide(out, total, largest, lse[part, head])


@jit()
def _add(bias, row, head, first, n, logits):
    if bias.size:
        row, head = row % bias.shape[0], head % bias.shape[1]
        for r in range(_u64(logits.shape[0])):
            for t in range(_u64(n)):
                logits[r, t] += bias[row, head, _u64(first) + t]


@jit()
def _divide(out, total, largest, lse):
    for r in range(_u64(out.shape[0])):
        if total[r] != 0:
            for j in range(_u64(out.shape[1])):
                out[r, j] /= total[r]
            lse[r] = largest[r] + np.log(total[r])


@jit()
def _decode(stream, head, first, n, codes, tile):
    """`tile` = minimum + codes * scale of the tokens `first` ... `first + n - 1`."""
    _, _, scale, minimum, _, token_group = stream
    _affine(codes.view(np.uint8), scale[head], minimum[head], token_group, first, n, tile)
    # unused tokens are multiplied, too: by 0
    for t in range(n, _TILE):
        for j in range(_u64(tile.shape[1])):
            tile[_u64(t), j] = 0


@jit()
def _unpack(packed, lanes, bits, first, n, codes):
    """As `unpack_row` of `bits`, token by token in the inner loop: a row is too short for one."""
    c, shift = _u64(codes.shape[1] // 8), _u64(0)
    for width in (_u64(8), _u64(4), _u64(2), _u64(1)):
        if _u64(bits) & width:
            mask = lanes * _u64((_u64(1) << width) - _u64(1))
            for k in range(_u64(codes.shape[1])):
                at, down = shift * c + k % (width * c), k // (width * c) * width
                for t in range(_u64(n)):
                    field = packed[_u64(first) + t, at] >> down & mask
                    if shift == _u64(0):
                        codes[t, k] = field
                    else:
                        codes[t, k] |= field << shift
            shift += width


@jit(fastmath=REORDER)
def _affine(codes, scale, minimum, token_group, first, n, tile):
    groups = _u64(scale.shape[1])
    group_size = _u64(tile.shape[1]) // groups
    row, left = _u64(first // token_group), token_group - first % token_group
    for t in range(_u64(n)):
        if group_size == _u64(1):
            for j in range(groups):
                tile[t, j] = _f32(_i32(codes[t, j])) * scale[row, j] + minimum[row, j]
        else:
            for group in range(groups):
                s, m = scale[row, group], minimum[row, group]
                for j in range(group * group_size, (group + _u64(1)) * group_size):
                    tile[t, j] = _f32(_i32(codes[t, j])) * s + m
        left -= 1
        if left == 0:
            row, left = row + _u64(1), token_group


@jit(fastmath=REORDER)
def _multiply(q, tile, logits):
    for r in range(_u64(q.shape[0])):
        # four tokens at a time: one load of q for four products
        for t in range(_u64(0), _u64(_TILE), _u64(4)):
            t1, t2, t3 = t + _u64(1), t + _u64(2), t + _u64(3)
            a = b = c = d = _f32(0)
            for j in range(_u64(q.shape[1])):
                x = q[r, j]
                a += x * tile[t, j]
                b += x * tile[t1, j]
                c += x * tile[t2, j]
                d += x * tile[t3, j]
            logits[r, t], logits[r, t1], logits[r, t2], logits[r, t3] = a, b, c, d


@jit(fastmath=REORDER)
def _softmax(logits, n, largest, total, out, powers):
    """`logits` become exp(logits - largest), 0 beyond the first `n`; `largest`, `total` and `out` follow."""
    power = powers.view(np.float32)
    for r in range(_u64(logits.shape[0])):
        m = largest[r]
        for t in range(_u64(n)):
            m = max(m, logits[r, t])
        if m > largest[r]:
            keep = np.exp(largest[r] - m)
            largest[r] = m
            total[r] *= keep
            for j in range(_u64(out.shape[1])):
                out[r, j] *= keep
        # exp(x) = 2^k exp(f), f in [-log(2) / 2, log(2) / 2] by Taylor (error 2e-7); vector code, unlike np.exp
        for t in range(_u64(n)):
            y = (logits[r, t] - m) * _f32(1.4426950408889634)
            k = _i32((y if y > _f32(-126) else _f32(-126)) - _f32(0.5))  # rounded, for y <= 0; NaN gives -126
            powers[t] = _i32(_i32(k + _i32(127)) << _i32(23))
            f = (y - _f32(k)) * _f32(0.6931471805599453)
            e = _f32(1 / 24) + f * (_f32(1 / 120) + f * _f32(1 / 720))
            e = _f32(1) + f * (_f32(1) + f * (_f32(1 / 2) + f * (_f32(1 / 6) + f * e)))
            logits[r, t] = _f32(0) if y < _f32(-126) else e
        s = _f32(0)
        for t in range(_u64(n)):
            logits[r, t] *= power[t]
            s += logits[r, t]
        total[r] += s
        for t in range(_u64(n), _u64(_TILE)):
            logits[r, t] = 0


@jit(fastmath=REORDER)
def _accumulate(weights, tile, out):
    for t in range(_u64(0), _u64(_TILE), _u64(8)):
        t1, t2, t3, t4 = t + _u64(1), t + _u64(2), t + _u64(3), t + _u64(4)
        t5, t6, t7 = t + _u64(5), t + _u64(6), t + _u64(7)
        for r in range(_u64(out.shape[0])):
            a, b, c, d = weights[r, t], weights[r, t1], weights[r, t2], weights[r, t3]
            e, f, g, h = weights[r, t4], weights[r, t5], weights[r, t6], weights[r, t7]
            for j in range(_u64(out.shape[1])):
                left = a * tile[t, j] + b * tile[t1, j] + c * tile[t2, j] + d * tile[t3, j]
                right = e * tile[t4, j] + f * tile[t5, j] + g * tile[t6, j] + h * tile[t7, j]
                out[r, j] += left + right
