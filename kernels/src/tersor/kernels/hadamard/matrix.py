"""Symmetric Hadamard matrices of order 2^k (Sylvester) and 4 q 2^k, q odd (Paley, propus): H = H^T and H H^T = n I."""

import functools
import math

import torch
from torch import Tensor

# a larger base costs more than the transform saves; none is in use
_LARGEST_BASE = 256

# the -1 of the rows a, b, d of `_propus`: order -> (multiplier, places in a, in b, in d); with a place, its products with
# all powers of the multiplier. Found by going through all rows of this kind that have a symmetric a, which takes seconds.
# Symmetric matrices of these orders are first in arXiv:1503.04226 (172) and arXiv:1708.05098 (156); Williamson's, which
# are older, are not symmetric
_PROPUS = {
    156: (16, (1, 4, 6, 14, 17, 21), (1, 6, 7, 8, 21, 26), (6, 7, 8, 13, 14, 17)),
    172: (4, (1, 2, 3, 6), (1, 2, 6), (1, 2, 7)),
}


def split(n: int) -> tuple[int, int]:
    """(base, power) with n = base * power: base 1 or 4 times an odd number, power the rest, a power of two.

    >>> split(4096), split(12 * 64)
    ((1, 4096), (12, 64))
    """
    power = n & -n
    odd = n // power
    return (1, n) if odd == 1 else (4 * odd, power // 4)


def is_order(n: int) -> bool:
    """Whether the matrix of order n is built in."""
    base, power = split(n)
    paley = base <= _LARGEST_BASE and (_characteristic(base - 1) or _characteristic(base // 2 - 1))
    return base == 1 or (power > 0 and bool(paley or base in _PROPUS))


def largest_block(n: int) -> int:
    """The largest block size that divides n."""
    return next(block for block in range(n, 0, -1) if n % block == 0 and is_order(block))


@functools.lru_cache(maxsize=64)
def factors(n: int) -> tuple[int, ...]:
    """Orders of small matrices with the matrix of order n as Kronecker product: the base, and powers of two up to 128."""
    base, power = split(n)
    exponent = power.bit_length() - 1
    parts = -(-exponent // 7)
    powers = [2 ** ((exponent + i) // parts) for i in range(parts)]
    return tuple(order for order in (base, *powers) if order > 1)


@functools.lru_cache(maxsize=64)
def hadamard_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H / sqrt(n), the orthonormal matrix of order n: base (x) Sylvester."""
    base, _ = split(n)
    # whatever the caller's modes are: the cache must not keep an inference tensor, or one on the default device
    with torch.inference_mode(False), torch.device("cpu"):
        H = _base_matrix(base)
        while len(H) < n:
            H = torch.kron(H, torch.tensor([[1, 1], [1, -1]]))
        return (H.double() * n**-0.5).to(dtype=dtype, device=device)


def _base_matrix(base: int) -> Tensor:
    if base == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    return _propus(base) if base in _PROPUS else _paley(base)


def _paley(order: int) -> Tensor:
    """Paley's constructions from the squares of a field of q elements, q = order - 1 or q = order / 2 - 1."""
    q = order - 1 if _characteristic(order - 1) else order // 2 - 1
    H = torch.ones(q + 1, q + 1, dtype=torch.int64)
    chi = _characters(q)
    if q == order - 1:
        # the first construction with its columns reversed, chi(x + y) for chi(x - y): so it is symmetric
        S = chi[:, -torch.arange(q) % q]
        H[1:, 1:] = torch.where(S == 0, -1, -S)
        return H
    H[1:, 1:] = chi
    H[0, 0] = 0
    return torch.kron(H, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
        torch.eye(q + 1, dtype=torch.int64), torch.tensor([[1, -1], [-1, -1]])
    )


def _characters(q: int) -> Tensor:
    """chi(x - y) (q, q) for x, y in a field of q = p or p^2 elements: 1 for squares, 0 for 0, -1 for others."""
    p = _characteristic(q)
    i = torch.arange(p)
    chi = torch.full((p,), -1)
    chi[i * i % p] = 1
    chi[0] = 0
    difference = (i[:, None] - i) % p
    if q == p:
        return chi[difference]
    # x = a + b sqrt(g), with g the least that is no square mod p, is number p a + b. It is a square of the large field where
    # its norm, x^(p + 1) = a^2 - g b^2, is one of the small: x^((p^2 - 1) / 2) = (x^(p + 1))^((p - 1) / 2)
    g = chi.tolist().index(-1)
    chi = chi[(i[:, None] ** 2 - g * i**2) % p]  # (a, b)
    return chi[difference[:, None, :, None], difference[:, None, :]].reshape(q, q)


def _propus(order: int) -> Tensor:
    """The generalised propus array (Seberry and Balonin, arXiv:1512.01732) of circulants A, B, D with A = A^T.

    It takes A A^T + 2 B B^T + D D^T = order I. B and D meet the reversal of columns, x[i + j] for x[i - j], which makes
    symmetric blocks of them. (The paper's C is B here: only then is H symmetric.)
    """
    n = order // 4
    multiplier, *representatives = _PROPUS[order]
    a, b, d = torch.ones(3, n, dtype=torch.int64)
    for row, places in zip((a, b, d), representatives, strict=True):
        row[[place * multiplier**k % n for place in places for k in range(n)]] = -1
    i = torch.arange(n)
    total = i[:, None] + i
    A = a[(i[:, None] - i) % n]
    B, B_ = b[total % n], b[-total % n]
    D, D_ = d[total % n], d[-total % n]
    blocks = ((-A, B, B, D), (B, D_, A, -B_), (B, A, -D_, B_), (D, -B_, B_, A))
    return torch.cat([torch.cat(row, 1) for row in blocks])


@functools.cache
def _characteristic(q: int) -> int:
    """p where q = p or p^2 for a prime p, else 0. Fields of p^3 and more elements add no order up to 256."""
    p = next((d for d in range(2, math.isqrt(max(q, 0)) + 1) if q % d == 0), q)
    return p if q > 1 and q in (p, p * p) else 0
