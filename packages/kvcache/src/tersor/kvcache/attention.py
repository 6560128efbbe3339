"""Attention that reads codes: decoding steps no longer decode the history."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tersor.kernels import attend_quantized, merge_attention
from tersor.kvcache.codec.affine import Affine, AffineCodes
from tersor.kvcache.history import PACKED_ATTENTION, History, LazyTensor

# batch x heads x tokens x head_dim of the keys: fewer are decoded as fast (on a CPU, 3 to 8 heads of 64 or 128)
MIN_VALUES = 2**18
# up to here codes win by 1.4 or more; the gap closes, since what is decoded once serves all queries
MAX_QUERIES = 64


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, `model` attends to the codes of a `CompressedCache` as they are; afterwards it is as it was.

    Where a forward brings at most 64 tokens, and tokens whose key and value are both codes hold 2^18 key values or more
    in a layer (1024 tokens of 4 heads of 64; fewer are decoded as fast), the queries attend to them and to the other
    tokens apart, and both are merged by the sums of their softmax (FlashDecoding's and RelayAttention's identity,
    arXiv:2402.14808): the same result up to float32 rounding. Tokens of which only the key or only the value is a code
    are decoded, which is all of them where one codec is `FullPrecision`. Elsewhere (the prompt, sliding windows, short
    histories, other caches, attention with a softcap or position bias) it is transformers' "sdpa". There is no
    gradient: with gradients enabled the history is decoded.

    The cache must have been made from `model.config` itself, or it will not know.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tersor.kvcache import CompressedCache, packed_attention, recipes
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2))
    >>> cache = CompressedCache(model.config, recipes.kivi(bits=4))
    >>> with packed_attention(model.eval()):
    ...     ids = model.generate(torch.arange(500)[None] % 64, past_key_values=cache, min_new_tokens=8, max_new_tokens=8)
    >>> ids.shape
    torch.Size([1, 508])

    Raises:
        NotImplementedError: the model's attention cannot be exchanged, or it is none that "sdpa" computes.
    """
    AttentionInterface.register(PACKED_ATTENTION, attend)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    if decoder._supports_sdpa:
        decoder.set_attn_implementation(PACKED_ATTENTION)
    if decoder.config._attn_implementation != PACKED_ATTENTION:
        raise NotImplementedError(
            f"{type(model).__name__} computes its attention ({before}) in a way of its own, not through transformers' "
            "AttentionInterface and 'sdpa'; use CompressedCache without packed_attention"
        )
    try:
        yield model
    finally:
        decoder.config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: (output (batch, queries, heads, head_dim), None)."""
    if isinstance(key, LazyTensor) and isinstance(value, LazyTensor):
        plain = not dropout and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
        output = _attend_packed(query, key.history, value.history, attention_mask, scaling) if plain else None
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
        key, value = key.dense, value.dense
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _attend_packed(
    query: Tensor, keys: History, values: History, mask: Tensor | None, scaling: float | None
) -> Tensor | None:
    """(batch, heads, queries, head_dim), or None where decoding is the way."""
    num_heads, num_queries, head_dim = query.shape[1:]
    # no mask, but several queries: causal from the first token on
    if num_queries > MAX_QUERIES or (mask is None and num_queries > 1) or head_dim != values.recent.shape[3]:
        return None
    pairs, num_written = _packed_pairs(keys, values)
    num_packed = min(num_written, keys.encoded, values.encoded)
    batch, num_key_value_heads = keys.recent.shape[:2]
    if batch * num_key_value_heads * num_packed * head_dim < MIN_VALUES:
        return None
    bias, packed_bias = None, query.new_zeros(1, 1, num_packed)
    if mask is not None:
        packed_mask, first = mask[..., :num_packed], mask[:, :1, :1, :num_packed]
        # one bias per token: what comes after the history is hidden from some queries, the history from all or none
        if packed_mask.shape != first.shape and not torch.equal(packed_mask, first.expand_as(packed_mask)):
            return None
        packed_bias = _additive(first)[:, :, 0]
        bias = _additive(mask[..., num_packed:]).expand(-1, num_heads, -1, -1)
    # codes that are written, but not read yet: leaving them out would copy all the others
    packed_bias = pad(packed_bias, (0, num_written - num_packed), value=-torch.inf)
    parts = [_attend_dense(query, keys.dense(num_packed), values.dense(num_packed), bias, scaling)]
    for key, value, start in pairs:
        parts.append(
            attend_quantized(
                query, key, value, keys.codec.bits, values.codec.bits, keys.codec.token_group, values.codec.token_group,
                packed_bias[..., start : start + key.packed.shape[2]], scaling,
            )
        )  # fmt: skip
    outputs, lse = zip(*parts)
    return merge_attention(torch.stack(outputs), torch.stack(lse))[0]


def _packed_pairs(keys: History, values: History) -> tuple[list[tuple[AffineCodes, AffineCodes, int]], int]:
    """Codes of keys and of values of the same oldest tokens, with the first of them; and how many tokens in all."""
    pairs, end = [], 0
    if not (isinstance(keys.codec, Affine) and isinstance(values.codec, Affine)):
        return pairs, end
    for key, key_first, key_last in keys.spans():
        for value, value_first, value_last in values.spans():
            start, stop = max(key_first, value_first), min(key_last, value_last)
            whole_groups = (
                (start - key_first) % keys.codec.token_group == (start - value_first) % values.codec.token_group == 0
            )
            if start == end < stop and whole_groups:
                key_part = keys.codec.part(key, start - key_first, stop - key_first)
                value_part = values.codec.part(value, start - value_first, stop - value_first)
                pairs.append((key_part, value_part, start))
                end = stop
    return pairs, end


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """(output, lse) as from `attend_quantized`, of full-precision tokens; `bias` (batch or 1, heads, queries, seq)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype).unflatten(1, (key.shape[1], -1)), key.to(dtype), value.to(dtype)
    # the query heads that share a key head are folded into its queries
    logits = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
    logits *= query.shape[3] ** -0.5 if scaling is None else scaling
    if bias is not None:
        logits += bias.unflatten(1, q.shape[1:3])
    output = logits.softmax(-1).flatten(2, 3) @ v
    return output.view_as(query).to(query.dtype), logits.logsumexp(-1).flatten(1, 2)


def _additive(mask: Tensor) -> Tensor:
    """What is added to logits: `mask` itself, or 0 where it is true and -inf elsewhere."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
