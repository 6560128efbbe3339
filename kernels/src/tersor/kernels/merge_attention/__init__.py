"""Attention over parts of the keys, put together: what makes split, shared and mixed caches exact."""

import torch
from torch import Tensor

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(outputs: Tensor, lse: Tensor) -> None:
    for name, tensor in (("outputs", outputs), ("lse", lse)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"merge_attention: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
    if lse.device != outputs.device:
        raise ValueError(f"merge_attention: lse is on {lse.device}, but outputs is on {outputs.device}")
    if outputs.dim() < 2 or lse.shape != outputs.shape[:-1]:
        raise ValueError(
            "merge_attention: outputs must be (parts, ..., head_dim) and lse (parts, ...), got "
            f"{tuple(outputs.shape)} and {tuple(lse.shape)}"
        )


def lse_dtype(lse: Tensor) -> torch.dtype:
    return torch.promote_types(lse.dtype, torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_output: Tensor, grad_lse: Tensor):
    outputs, lse, output, total = ctx.saved_tensors
    dtype = torch.promote_types(outputs.dtype, total.dtype)
    empty = lse == -torch.inf
    share = (lse.to(dtype) - total).exp().masked_fill(empty, 0)
    centred = (outputs.to(dtype) - output).masked_fill(empty[..., None], 0)
    grad_share = (centred * grad_output.to(dtype)).sum(-1) + grad_lse
    return (share[..., None] * grad_output).to(outputs.dtype), (share * grad_share).to(lse.dtype)


@op(
    "(Tensor outputs, Tensor lse) -> (Tensor, Tensor)",
    check=_check,
    fake=lambda outputs, lse: (
        outputs.new_empty(outputs.shape[1:]),
        lse.new_empty(lse.shape[1:], dtype=lse_dtype(lse)),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
def merge_attention(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(output (..., head_dim), lse (...)) of attention over all keys, from its parts over disjoint sets of keys.

        lse = log sum_i exp(lse_i),    output = sum_i exp(lse_i - lse) output_i

    Exact, and associative up to rounding (FlashDecoding's and RelayAttention's identity, arXiv:2402.14808). A part with
    lse = -inf saw no key: its output is ignored, even NaN; where all are, output is 0 and lse -inf. NaN propagates.

    Computed in float32 at least; the output has the dtype of `outputs`, lse is float32 (float64 for float64).
    Differentiable in both arguments.

    Args:
        outputs: (parts, ..., head_dim).
        lse: (parts, ...), the natural logarithm of the sum of exp(logits).

    >>> output, lse = merge_attention(torch.tensor([[2.0], [4.0]]), torch.tensor([0.0, 0.0]))
    >>> output, lse
    (tensor([3.]), tensor(0.6931))
    """
    dtype = torch.promote_types(outputs.dtype, lse_dtype(lse))
    total = lse.to(lse_dtype(lse)).logsumexp(0)
    empty = lse == -torch.inf
    share = (lse - total).to(dtype).exp().masked_fill(empty, 0)
    output = (share[..., None] * outputs.masked_fill(empty[..., None], 0)).sum(0)
    return output.to(outputs.dtype), total
