"""Selection of tokens, and sums of features, beside the same in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tersor.kernels.bench.case import Case, Prepare, on, ours, reference
from tersor.kernels.bipartite_match import bipartite_match
from tersor.kernels.gather_tokens import gather_tokens
from tersor.kernels.merge_tokens import merge_tokens
from tersor.kernels.topk_mask import topk_mask
from tersor.kernels.weighted_sum import weighted_sum


def cases(tokens: int = 4096) -> list[Case]:
    return [
        *(_gather(*shape) for shape in ((8, 197, 768, 98), (2, tokens, 1024, tokens // 2))),
        *(_merge(*shape) for shape in ((8, 197, 768, 49), (1, tokens, 1024, tokens // 4))),
        *(_match(*shape) for shape in ((8, 98, 64), (1, tokens // 2, 64), (1, tokens, 384))),
        *(_topk(*shape) for shape in ((64, 1024, 512), (32, 4 * tokens, tokens // 2), (1, 256 * tokens, tokens // 4))),
        *(_weighted_sum(n, dtype) for n in (32 * tokens, 1024 * tokens) for dtype in ("float32", "bfloat16")),
    ]


def _contenders(
    draw: Callable[[], tuple[Any, ...]], op: Callable[..., object], **others: Prepare
) -> dict[str, Prepare]:
    return {"ours": ours(on(draw, op)), "PyTorch": reference(on(draw, op)), **others}


def _gather(batch: int, tokens: int, dim: int, k: int) -> Case:
    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(batch, tokens, dim), torch.rand(batch, tokens).argsort(-1)[:, :k].sort(-1).values

    gather = on(draw, lambda x, index: x.gather(1, index[..., None].expand(-1, -1, dim)))
    copy = on(draw, lambda x, index: x[:, :k].contiguous())
    contenders = _contenders(draw, gather_tokens, gather=gather, copy=copy)
    return Case("gather_tokens", f"{k} of {batch} x {tokens} x {dim}", 4 * batch * k * dim, contenders)


def _merge(batch: int, tokens: int, dim: int, r: int) -> Case:
    """The last r tokens go into random others."""
    kept = tokens - r

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        into = torch.randint(kept, (batch, r))
        place = torch.cat([torch.arange(kept).expand(batch, -1), into], 1)
        return torch.randn(batch, tokens, dim), torch.rand(batch, tokens) + 0.5, place

    def scatter(x: Tensor, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        into = place[:, kept:]
        total = size[:, :kept].scatter_add(1, into, size[:, kept:])
        wide = into[..., None].expand(-1, -1, dim)
        step = (x[:, kept:] - x.gather(1, wide)) * (size[:, kept:] / total.gather(1, into))[..., None]
        return x[:, :kept].scatter_add(1, wide, step), total

    def merge(x: Tensor, size: Tensor, place: Tensor) -> object:
        return merge_tokens(x, size, place, kept)

    contenders = _contenders(draw, merge, scatter=on(draw, scatter))
    return Case("merge_tokens", f"{r} of {batch} x {tokens} x {dim}", 4 * batch * tokens * dim, contenders)


def _match(batch: int, n: int, dim: int) -> Case:
    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(batch, n, dim), torch.randn(batch, n, dim)

    product = on(draw, lambda a, b: normalize(a, dim=-1) @ normalize(b, dim=-1).mT)
    contenders = _contenders(draw, bipartite_match, matmul=product)
    return Case("bipartite_match", f"{batch} x {n} x {n}, {dim} features", 8 * batch * n * dim, contenders)


def _topk(rows: int, n: int, k: int) -> Case:
    def draw() -> tuple[Tensor]:
        return (torch.randn(rows, n),)

    def topk(scores: Tensor) -> Tensor:  # any of equal ones
        chosen = scores.topk(k, dim=-1, sorted=False).indices
        return torch.zeros(rows, n, dtype=torch.bool).scatter_(-1, chosen, True)

    kthvalue = on(draw, lambda scores: scores >= scores.kthvalue(n - k + 1, -1, True).values)
    contenders = _contenders(draw, lambda scores: topk_mask(scores, k), topk=on(draw, topk), kthvalue=kthvalue)
    return Case("topk_mask", f"{k} of {rows} x {n}", 4 * rows * n, contenders)


def _weighted_sum(n: int, name: str) -> Case:
    dtype = getattr(torch, name)
    weights = [2.0, -1.5, 0.5]

    def draw() -> tuple[list[Tensor]]:
        return (list(torch.randn(len(weights), n).to(dtype)),)

    def add(history: list[Tensor]) -> Tensor:
        total = torch.zeros(n)
        for weight, feature in zip(weights, history):
            total.add_(feature, alpha=weight)
        return total.to(dtype)

    copy = on(draw, lambda history: history[0].clone())
    contenders = _contenders(draw, lambda history: weighted_sum(weights, history), add_=on(draw, add), copy=copy)
    return Case(f"weighted_sum {name}", f"{len(weights)} x {n}", len(weights) * n * dtype.itemsize, contenders)
