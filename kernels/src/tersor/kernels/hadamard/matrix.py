"""Symmetric Hadamard matrices of order 2^k (Sylvester) and 4 q 2^k, q odd (Paley): H = H^T and H H^T = n I."""

import functools

import torch
from torch import Tensor

# a larger base costs more than the transform saves; none is in use
_LARGEST_BASE = 256


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
    paley = base <= _LARGEST_BASE and (_is_prime(base - 1) or _is_prime(base // 2 - 1))
    return base == 1 or (power > 0 and paley)


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
        H = _paley(base) if base > 1 else torch.ones(1, 1, dtype=torch.int64)
        while len(H) < n:
            H = torch.kron(H, torch.tensor([[1, 1], [1, -1]]))
        return (H.double() * n**-0.5).to(dtype=dtype, device=device)


def _paley(order: int) -> Tensor:
    """Paley's constructions from the quadratic residues of a prime q = order - 1 or q = order / 2 - 1."""
    q = order - 1 if _is_prime(order - 1) else order // 2 - 1
    i = torch.arange(q)
    residue = torch.full((q,), -1)
    residue[i * i % q] = 1
    residue[0] = 0
    H = torch.ones(q + 1, q + 1, dtype=torch.int64)
    if q == order - 1:
        # the first construction with its columns reversed, residue[i + j] for residue[i - j]: so it is symmetric
        S = residue[(i[:, None] + i) % q]
        H[1:, 1:] = torch.where(S == 0, -1, -S)
        return H
    H[1:, 1:] = residue[(i[:, None] - i) % q]
    H[0, 0] = 0
    return torch.kron(H, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
        torch.eye(q + 1, dtype=torch.int64), torch.tensor([[1, -1], [-1, -1]])
    )


@functools.cache
def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
