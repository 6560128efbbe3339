"""Tree attention on the CPU: PyTorch's flash attention over the cache, a small matrix product over the tree, merged.

The query heads of a key head are folded into its queries, so that PyTorch reads the cache once and not once for each.
"""

import torch
from torch import Tensor

from tersor.kernels.merge_attention import merge_attention


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, _, nodes, head_dim = query.shape
    heads, cached = key.shape[1], key.shape[2] - nodes
    factor = head_dim**-0.5 if scale is None else scale
    if query.numel() == 0:
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=dtype)
    # the flash kernel writes its output in the order of the query's memory, but reads that of it as rows
    q = query.reshape(batch, heads, -1, head_dim).contiguous()
    rows = q.shape[2]
    parts = [_over_tree(q, key[:, :, cached:], value[:, :, cached:], ancestors, bias, factor, dtype)]
    if cached:
        mask = None if bias is None else bias[:, :, None, :cached].to(dtype).expand(batch, heads, rows, cached)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, key[:, :, :cached], value[:, :, :cached], attn_mask=mask, scale=factor
        )
        if bias is not None:
            lse = lse.masked_fill((bias[:, :, None, :cached] == -torch.inf).all(-1), -torch.inf)
        parts.append((output.to(dtype), lse))
    output, lse = (torch.stack(part) for part in zip(*parts))
    output, lse = merge_attention(output, lse)
    return output.to(query.dtype).view(query.shape), lse.view(query.shape[:3])


def _over_tree(
    q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, bias: Tensor | None, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    nodes = k.shape[2]
    logits = (q.to(dtype) * factor) @ k.to(dtype).mT  # (batch, heads, query heads of each * nodes, nodes)
    if bias is not None:
        logits += bias[:, :, None, -nodes:].to(dtype)
    logits = logits.unflatten(2, (-1, nodes)).masked_fill_(
        ~ancestors.expand(len(q), nodes, nodes)[:, None, None], -torch.inf
    )
    logits = logits.flatten(2, 3)
    # where nothing is visible the output is NaN, which merge_attention ignores
    return logits.softmax(-1) @ v.to(dtype), logits.logsumexp(-1)
