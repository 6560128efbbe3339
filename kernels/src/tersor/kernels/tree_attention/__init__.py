"""Attention of a draft tree's nodes over the cache and their ancestors, all nodes in one forward."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ancestor_mask(parents: Tensor) -> Tensor:
    """(..., nodes, nodes) boolean: node j is node i or one of its ancestors, from `parents` (..., nodes), -1 for a root.

    Its row sums are the nodes' depths + 1. A parent comes before its children; a node of padding is a root.

    >>> ancestor_mask(torch.tensor([-1, 0, 0, 1])).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 1, 0, 1]], dtype=torch.int32)
    """
    if parents.is_floating_point() or parents.is_complex() or parents.dim() == 0:
        raise TypeError(f"ancestor_mask: parents must be integers (..., nodes), got {parents.dtype}, {parents.dim()}-d")
    nodes = torch.arange(parents.shape[-1], device=parents.device)
    if ((parents < -1) | (parents >= nodes)).any():
        raise ValueError("ancestor_mask: a parent must be -1 or the index of an earlier node; sort nodes by depth")
    mask = (parents[..., None] == nodes) | (nodes == nodes[:, None])
    # after k squarings, ancestors up to 2^k generations away
    for _ in range(max(0, len(nodes) - 1).bit_length()):
        mask = (mask.float() @ mask.float()) > 0
    return mask


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> None:
    if query.dtype not in _DTYPES:
        raise TypeError(f"tree_attention: query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"tree_attention: {name} is {tensor.dtype}, but query is {query.dtype}")
    if key.shape != value.shape:
        raise ValueError(
            f"tree_attention: key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if (
        query.dim() != 4
        or key.dim() != 4
        or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3])
        or query.shape[3] == 0
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "tree_attention: query must be (batch, num_heads, nodes, head_dim) and key (batch, num_key_value_heads, "
            "cached + nodes, head_dim), num_heads a multiple of num_key_value_heads, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, nodes, keys = query.shape[0], query.shape[2], key.shape[2]
    if keys < nodes:
        raise ValueError(f"tree_attention: key must end with the {nodes} nodes of the tree, but holds {keys} tokens")
    if ancestors.dtype != torch.bool:
        raise TypeError(
            f"tree_attention: ancestors must be bool, got {ancestors.dtype}; ancestor_mask(parents) makes it"
        )
    if ancestors.shape not in ((nodes, nodes), (batch, nodes, nodes)):
        raise ValueError(
            f"tree_attention: ancestors must be (nodes, nodes) or (batch, nodes, nodes) with nodes = {nodes}, batch = "
            f"{batch}, got {tuple(ancestors.shape)}"
        )
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"tree_attention: bias must be floating point, got {bias.dtype}")
        if (
            bias.dim() != 3
            or bias.shape[0] not in (1, batch)
            or bias.shape[1] not in (1, key.shape[1])
            or bias.shape[2] != keys
        ):
            raise ValueError(
                "tree_attention: bias must be (batch or 1, num_key_value_heads or 1, cached + nodes) = "
                f"({batch}, {key.shape[1]}, {keys}), got {tuple(bias.shape)}"
            )
    for name, tensor in (("key", key), ("value", value), ("ancestors", ancestors), ("bias", bias)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"tree_attention: {name} is on {tensor.device}, but query is on {query.device}")


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor ancestors, Tensor? bias=None, float? scale=None) "
    "-> (Tensor, Tensor)",
    check=_check,
    fake=lambda query, *_: (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)),
    ),
    no_gradient="call it under torch.no_grad(), or use torch.nn.functional.scaled_dot_product_attention with the full mask",
)
def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of a tree's nodes over all cached tokens and, of the tree, what `ancestors` lets each one see.

    Equals `scaled_dot_product_attention` with the full mask (nodes, cached + nodes), of which only the (nodes, nodes)
    corner exists here (tree attention, arXiv:2305.09781; prefix and tree joined by `merge_attention`, arXiv:2502.17421).
    `output` is like `query`; `lse` (batch, num_heads, nodes) is the logarithm of the softmax's denominator. Query head
    h reads key and value head h // (num_heads / num_key_value_heads). A node that sees nothing has output 0 and lse
    -inf. NaN propagates. No gradient: asking for one raises in the backward pass.

    Computed in float32 (float64 for float64) and rounded once to query's dtype, except that the CPU body rounds the
    cache's part before it is merged, and the GPU body the softmax's weights; lse stays float32 (float64).

    Args:
        query: (batch, num_heads, nodes, head_dim).
        key, value: (batch, num_key_value_heads, cached + nodes, head_dim): the cache after its update with the nodes.
        ancestors: bool, (nodes, nodes) or (batch, nodes, nodes): [i, j] if node i sees node j; `ancestor_mask(parents)`.
        bias: a float per token, added to the logits, -inf hides a token: (batch or 1, num_key_value_heads or 1,
            cached + nodes). For left padding, and for nodes of padding.
        scale: default 1 / sqrt(head_dim).

    >>> query, key = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2)  # one cached token, then a root and two children
    >>> value = torch.tensor([4.0, 8.0, 6.0, 0.0]).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    >>> output, lse = tree_attention(query, key, value, ancestor_mask(torch.tensor([-1, 0, 0])))
    >>> output[0, 0, :, 0], lse.exp()
    (tensor([6., 6., 4.]), tensor([[[2., 3., 3.]]]))
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # (batch, key-value heads, query heads of each, nodes, head_dim)
    q = query.to(dtype).unflatten(1, (key.shape[1], -1)) * (query.shape[3] ** -0.5 if scale is None else scale)
    logits = q @ key.to(dtype)[:, :, None].mT
    if bias is not None:
        logits = logits + bias.to(dtype)[:, :, None, None]
    cached, nodes = key.shape[2] - query.shape[2], query.shape[2]
    hidden = ~ancestors.expand(query.shape[0], nodes, nodes)[:, None, None]
    logits = torch.cat([logits[..., :cached], logits[..., cached:].masked_fill(hidden, -torch.inf)], -1)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    return (weights @ value.to(dtype)[:, :, None]).flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
