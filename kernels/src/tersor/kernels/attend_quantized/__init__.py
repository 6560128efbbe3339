"""Attention of a few queries over keys and values kept as packed codes: a decode step over a quantised cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.kernels.bits import unpack_bits
from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_stream(
    name: str, stream: Sequence[Tensor], bits: int, token_group: int, query: Tensor, seq_len: int
) -> None:
    if len(stream) != 3:
        raise ValueError(f"attend_quantized: {name} must be (packed, scale, minimum), got {len(stream)} tensors")
    packed, scale, minimum = stream
    if not 1 <= bits <= 8:
        raise ValueError(f"attend_quantized: {name}_bits must be 1 to 8, got {bits}")
    if token_group < 1:
        raise ValueError(f"attend_quantized: {name}_token_group must be 1 or more, got {token_group}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"attend_quantized: {name}'s packed must be uint8, got {packed.dtype}; pack_bits makes it")
    for part, tensor in (("packed", packed), ("scale", scale), ("minimum", minimum)):
        if tensor.device != query.device:
            raise ValueError(f"attend_quantized: {name}'s {part} is on {tensor.device}, but query is on {query.device}")
    batch, head_dim = query.shape[0], query.shape[3]
    if packed.dim() != 4 or packed.shape[0] != batch or packed.shape[2:] != (seq_len, (head_dim + 7) // 8 * bits):
        raise ValueError(
            f"attend_quantized: {name}'s packed must be (batch, num_key_value_heads, seq, bytes) = ({batch}, "
            f"num_key_value_heads, {seq_len}, {(head_dim + 7) // 8 * bits}), since {head_dim} codes of {bits} bits "
            f"take {(head_dim + 7) // 8 * bits} bytes, got {tuple(packed.shape)}"
        )
    groups = -(-seq_len // token_group)
    for part, tensor in (("scale", scale), ("minimum", minimum)):
        if not tensor.is_floating_point():
            raise TypeError(f"attend_quantized: {name}'s {part} must be floating point, got {tensor.dtype}")
        channel_groups = tensor.shape[3:].numel() if tensor.dim() >= 4 else 0
        if tensor.dim() < 4 or tensor.shape[:3] != (*packed.shape[:2], groups):
            raise ValueError(
                f"attend_quantized: {name}'s {part} must be (batch, num_key_value_heads, ceil(seq / {name}_token_group)"
                f", channel groups) = ({batch}, {packed.shape[1]}, {groups}, ...), got {tuple(tensor.shape)}"
            )
        if channel_groups < 1 or head_dim % channel_groups:
            raise ValueError(
                f"attend_quantized: the {channel_groups} channel groups of {name}'s {part} do not divide head_dim = "
                f"{head_dim}"
            )
    if scale.shape != minimum.shape:
        raise ValueError(
            f"attend_quantized: {name}'s scale and minimum must have one shape, got {tuple(scale.shape)} and "
            f"{tuple(minimum.shape)}"
        )


def _check(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    key_bits: int,
    value_bits: int,
    key_token_group: int = 1,
    value_token_group: int = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> None:
    if query.dtype not in _DTYPES:
        raise TypeError(f"attend_quantized: query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if query.dim() != 4 or query.shape[3] == 0:
        raise ValueError(
            "attend_quantized: query must be (batch, num_heads, queries, head_dim), head_dim 1 or more, got "
            f"{tuple(query.shape)}"
        )
    seq_len = key[0].shape[2] if len(key) and key[0].dim() == 4 else 0
    _check_stream("key", key, key_bits, key_token_group, query, seq_len)
    _check_stream("value", value, value_bits, value_token_group, query, seq_len)
    num_key_value_heads = key[0].shape[1]
    if value[0].shape[1] != num_key_value_heads:
        raise ValueError(f"attend_quantized: key has {num_key_value_heads} heads, but value has {value[0].shape[1]}")
    if num_key_value_heads == 0 or query.shape[1] % num_key_value_heads:
        raise ValueError(
            f"attend_quantized: num_heads = {query.shape[1]} is not a multiple of num_key_value_heads = "
            f"{num_key_value_heads}"
        )
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(
                f"attend_quantized: bias must be floating point, got {bias.dtype}; for a mask of visible tokens use "
                "torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)"
            )
        if bias.device != query.device:
            raise ValueError(f"attend_quantized: bias is on {bias.device}, but query is on {query.device}")
        if (
            bias.dim() != 3
            or bias.shape[0] not in (1, query.shape[0])
            or bias.shape[1] not in (1, num_key_value_heads)
            or bias.shape[2] != seq_len
        ):
            raise ValueError(
                "attend_quantized: bias must be (batch or 1, num_key_value_heads or 1, seq) = "
                f"({query.shape[0]}, {num_key_value_heads}, {seq_len}), got {tuple(bias.shape)}"
            )


def _decode(stream: Sequence[Tensor], bits: int, token_group: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    packed, scale, minimum = stream
    codes = unpack_bits(packed, bits, head_dim).to(dtype)
    scale, minimum = (
        grid.flatten(3).to(dtype).repeat_interleave(token_group, 2)[:, :, : packed.shape[2]]
        for grid in (scale, minimum)
    )
    # (batch, heads, seq, channel groups, channels)
    return (codes.unflatten(-1, (scale.shape[3], -1)) * scale[..., None] + minimum[..., None]).flatten(3)


@op(
    "(Tensor query, Tensor[] key, Tensor[] value, int key_bits, int value_bits, int key_token_group=1, "
    "int value_token_group=1, Tensor? bias=None, float? scale=None) -> (Tensor, Tensor)",
    check=_check,
    fake=lambda query, *_: (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)),
    ),
    no_gradient="call it under torch.no_grad(), or decode the cache and use torch.nn.functional.scaled_dot_product_attention",
)
def attend_quantized(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    key_bits: int,
    value_bits: int,
    key_token_group: int = 1,
    value_token_group: int = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of softmax(scale * query key^T + bias) value, with key = minimum + codes * scale and value alike.

    `output` is like `query` (batch, num_heads, queries, head_dim); `lse` (batch, num_heads, queries) is the logarithm
    of the softmax's denominator, with which `merge_attention` joins this with attention over other tokens. Query head
    h reads key and value head h // (num_heads / num_key_value_heads). A query that sees no token (bias = -inf on all,
    or none there) has output 0 and lse -inf. NaN propagates, also from masked tokens.

    Computed in float32 (float64 for float64) and rounded once to query's dtype; lse stays float32 (float64). The GPU
    body rounds decoded keys and values, and the softmax's weights, to query's dtype before it multiplies. No gradient:
    asking for one raises in the backward pass.

    Args:
        key, value: (packed, scale, minimum). `packed` (batch, num_key_value_heads, seq, ceil(head_dim / 8) * bits) is
            `pack_bits` of each token; `scale` and `minimum` are (batch, num_key_value_heads, ceil(seq / token_group),
            channel groups), floating point, where `token_group` consecutive tokens share a grid, and so do head_dim /
            (channel groups) neighbouring channels: (..., ceil(seq / 32), head_dim) is KIVI's grid of keys
            (arXiv:2402.02750), (..., seq, head_dim / 32) that of values. Dimensions that flatten to the last one may
            stand for it. Contiguous codes are read in place.
        bias: a float per token, added to the logits: (batch or 1, num_key_value_heads or 1, seq), -inf hides a token.
        scale: default 1 / sqrt(head_dim).

    >>> from tersor.kernels import pack_bits
    >>> packed = pack_bits(torch.tensor([[0] * 8, [3] * 8], dtype=torch.uint8).view(1, 1, 2, 8), 2)
    >>> grid = packed, torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)  # two tokens, of 0 and of 3
    >>> output, lse = attend_quantized(torch.zeros(1, 1, 1, 8), grid, grid, 2, 2)
    >>> output[0, 0, 0, 0], lse[0, 0, 0].exp()
    (tensor(1.5000), tensor(2.))
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    head_dim = query.shape[3]
    k = _decode(key, key_bits, key_token_group, head_dim, dtype)
    v = _decode(value, value_bits, value_token_group, head_dim, dtype)
    # (batch, key-value heads, query heads of each, queries, head_dim)
    q = query.to(dtype).unflatten(1, (k.shape[1], -1)) * (head_dim**-0.5 if scale is None else scale)
    logits = q @ k[:, :, None].mT
    if bias is not None:
        logits = logits + bias.to(dtype)[:, :, None, None]
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    return (weights @ v[:, :, None]).flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
