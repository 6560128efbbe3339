"""How much attention each key receives: the column sums of the attention matrix, without the matrix."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# queries whose rows of the attention matrix the reference holds at a time
_BLOCK = 32


def _check(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> None:
    if query.dtype not in _DTYPES:
        raise TypeError(f"received_attention: query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if key.dtype != query.dtype:
        raise TypeError(f"received_attention: key is {key.dtype}, but query is {query.dtype}; use key.to(query.dtype)")
    if (
        query.dim() != 4
        or key.dim() != 4
        or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3])
        or query.shape[3] == 0
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "received_attention: query must be (batch, num_heads, queries, head_dim) and key (batch, "
            "num_key_value_heads, keys, head_dim), num_heads a multiple of num_key_value_heads, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, num_heads, queries, _ = query.shape
    for name, tensor, last in (("weight", weight, queries), ("bias", bias, key.shape[2]), ("lse", lse, queries)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"received_attention: {name} must be floating point, got {tensor.dtype}")
        expected = (batch, num_heads, last)
        one = 0 if name == "lse" else 1  # the others broadcast
        if (
            tensor.dim() != 3
            or any(a not in (b, one) for a, b in zip(tensor.shape[:2], expected))
            or tensor.shape[2] != last
        ):
            raise ValueError(
                f"received_attention: {name} must be {'' if name == 'lse' else 'broadcastable to '}(batch, num_heads, "
                f"{'keys' if name == 'bias' else 'queries'}) = {expected}, got {tuple(tensor.shape)}"
            )
    for name, tensor in (("key", key), ("weight", weight), ("bias", bias), ("lse", lse)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"received_attention: {name} is on {tensor.device}, but query is on {query.device}")


@op(
    "(Tensor query, Tensor key, Tensor? weight=None, Tensor? bias=None, Tensor? lse=None, bool is_causal=False, "
    "float? scale=None) -> Tensor",
    check=_check,
    fake=lambda query, key, *_: query.new_empty(
        *query.shape[:2], key.shape[2], dtype=torch.promote_types(query.dtype, torch.float32)
    ),
    no_gradient="call it under torch.no_grad(), or sum the rows of torch.softmax(query @ key.mT, -1) where that fits in memory",
)
def received_attention(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """sum_i weight_i A_ij (batch, num_heads, keys) of A = softmax(scale * query key^T + bias), float32 (float64).

    What H2O (arXiv:2306.14048) accumulates, SnapKV (arXiv:2404.14469) takes from the last queries, and scorers of image
    tokens without a class token rank by. Memory is linear in the number of keys: A is made and summed block by block.
    Query head h reads key head h // (num_heads / num_key_value_heads). A query that sees no key gives nothing to any.
    NaN propagates. No gradient: asking for one raises in the backward pass.

    Args:
        query, key: (batch, num_heads, queries, head_dim), (batch, num_key_value_heads, keys, head_dim), of one dtype.
        weight: of each query, broadcastable to (batch, num_heads, queries); 0 leaves padding out. Default: 1.
        bias: of each key, added to the logits: -inf hides it, log(size) makes it count as a merged token (ToMe,
            arXiv:2210.09461). Broadcastable to (batch, num_heads, keys).
        lse: of each query (batch, num_heads, queries), the logarithm of the softmax's denominator, where it is known or
            covers other keys too, as `attend_quantized` returns it; A is then exp(logits - lse). Default: of these keys.
        is_causal: the last query sees all keys, the one before all but the last, and so on.
        scale: default 1 / sqrt(head_dim).

    >>> query = torch.zeros(1, 1, 3, 8)  # equal attention to all that is visible
    >>> received_attention(query, query, is_causal=True)  # 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3
    tensor([[[1.8333, 0.8333, 0.3333]]])
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[2], key.shape[2]
    k = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    q = query.to(dtype) * (query.shape[3] ** -0.5 if scale is None else scale)
    received = q.new_zeros(*q.shape[:2], keys)
    for start in range(0, queries, _BLOCK):
        block = slice(start, start + _BLOCK)
        logits = q[:, :, block] @ k.mT
        if bias is not None:
            logits = logits + bias.to(dtype)[:, :, None]
        if is_causal:
            logits = logits.masked_fill(hidden(start, logits.shape[2], queries, keys, q.device), -torch.inf)
        denominator = logits.logsumexp(-1) if lse is None else lse[:, :, block].to(dtype)
        empty = denominator == -torch.inf
        shares = (logits - denominator[..., None]).exp().masked_fill(empty[..., None], 0)
        received += (shares if weight is None else shares * weight[:, :, block, None].to(dtype)).sum(2)
    return received


def hidden(start: int, num: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(num, keys): True where a key lies after the query, for the queries `start` ... `start + num - 1`."""
    last = torch.arange(start, start + num, device=device) + keys - queries
    return torch.arange(keys, device=device) > last[:, None]
