"""Received attention on the CPU: the same blocks in PyTorch, as large as the caches and without what nobody sees."""

import torch
from torch import Tensor

from tersor.kernels.received_attention import hidden

# 4 MiB of float32 at a time
_ELEMENTS = 2**20


def received_attention(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads, (heads, keys) = query.shape[1], (key.shape[0] * key.shape[1], key.shape[2])
    group, queries = query.shape[1] // key.shape[1], query.shape[2]
    received = torch.zeros(*query.shape[:2], keys, dtype=dtype)
    if not (received.numel() and queries):
        return received
    # (heads of keys, heads of queries for each, ...)
    q = query.reshape(heads, group, queries, -1)
    k = key.reshape(heads, 1, keys, -1)
    of_each = received.view(heads, group, keys)
    weight, bias = (
        None if t is None else t.expand(query.shape[0], num_heads, -1).reshape(heads, group, -1) for t in (weight, bias)
    )
    denominator = None if lse is None else lse.reshape(heads, group, queries)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    num_queries = min(queries, max(16, _ELEMENTS // (group * keys)))
    num_heads = max(1, _ELEMENTS // (group * keys * num_queries))
    for h in (slice(i, i + num_heads) for i in range(0, heads, num_heads)):
        kt = k[h].to(dtype).mT
        for start in range(max(0, queries - keys) if is_causal else 0, queries, num_queries):
            rows = slice(start, min(queries, start + num_queries))
            visible = slice(keys - queries + rows.stop if is_causal else keys)
            shares = (q[h, :, rows].to(dtype) * factor) @ kt[..., visible]
            if bias is not None:
                shares += bias[h, :, None, visible].to(dtype)
            if is_causal:
                after = hidden(start, rows.stop - start, rows.stop, visible.stop, shares.device)
                shares.masked_fill_(after, -torch.inf)
            if denominator is not None:
                total = denominator[h, :, rows, None].to(dtype)
                shares.sub_(total).exp_().masked_fill_(total == -torch.inf, 0)
            else:
                # a query that sees nothing
                empty = None if bias is None else shares.amax(-1, keepdim=True) == -torch.inf
                shares = shares.softmax(-1)
                if empty is not None:
                    shares.masked_fill_(empty, 0)
            if weight is None:
                of_each[h, :, visible] += shares.sum(2)
            else:
                of_each[h, :, visible] += (weight[h, :, None, rows].to(dtype) @ shares).squeeze(2)
    return received
