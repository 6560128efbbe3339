"""The most similar token of another set."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tersor.kernels.dispatch import op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(a: Tensor, b: Tensor) -> None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"bipartite_match: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
    if a.dtype != b.dtype:
        raise TypeError(f"bipartite_match: b is {b.dtype}, but a is {a.dtype}; use b.to(a.dtype)")
    if b.device != a.device:
        raise ValueError(f"bipartite_match: b is on {b.device}, but a is on {a.device}")
    if a.dim() != 3 or b.dim() != 3 or len(a) != len(b) or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"bipartite_match: a must be (batch, tokens of A, dim) and b (batch, tokens of B, dim), got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[1] and not b.shape[1]:
        raise ValueError("bipartite_match: b has no tokens, so those of a have nothing to match")


def unit(x: Tensor) -> Tensor:
    """Tokens of length 1 in float32 at least: half precision has too many ties."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def holds_nan(x: Tensor) -> Tensor:
    """Which tokens of `unit` hold NaN."""
    return x.sum(-1).isnan()


def nan_wins(in_a: Tensor, in_b: Tensor, score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The match from that of a body which knows no NaN, and from `holds_nan` of both sets."""
    any_in_b, first_in_b = in_b.any(-1, keepdim=True), in_b.byte().argmax(-1, keepdim=True)
    score = score.masked_fill(in_a | any_in_b, float("nan"))
    return score, torch.where(any_in_b, first_in_b, index).masked_fill(in_a, 0)


def _fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    score = a.new_empty(a.shape[:2], dtype=torch.promote_types(a.dtype, torch.float32))
    return score, a.new_empty(a.shape[:2], dtype=torch.int64)


@op(
    "(Tensor a, Tensor b) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    no_gradient="detach a and b, or compute the cosine of the matched tokens in PyTorch",
)
def bipartite_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """max_j cos(a_i, b_j) and its j, for each token i of `a` (batch, tokens of A, dim) among those of `b` (batch,
    tokens of B, dim): the matching step of arXiv:2210.09461, section 3. The CPU and GPU bodies never hold the whole
    similarity matrix.

    Of equal similarities the lowest index wins; bodies may differ where similarities differ by less than their
    rounding. Computed in float32 (float64 for float64); lengths below 1e-12 count as 1e-12, so that zeros are similar
    to nothing. As in `torch.max`, NaN is larger than every number: a token of `a` with NaN or infinity in it has score
    NaN and index 0, and such a token of `b` is matched by all others.

    There is no gradient: asking for one raises in the backward pass.

    Returns:
        score (batch, tokens of A), float32 (or float64), and index (batch, tokens of A), int64.

    >>> a, b = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 3.0], [3.0, 3.0], [2.0, 2.0]]])
    >>> score, index = bipartite_match(a, b)
    >>> index
    tensor([[1, 1]])
    """
    if not a.numel() or not b.numel():
        score, index = _fake(a, b)
        return score.zero_(), index.zero_()
    score, index = (unit(a) @ unit(b).mT).max(-1)
    return score, index
