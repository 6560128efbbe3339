"""Two sets of tokens, edges only between them: no clustering, no iterations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kernels import bipartite_match
from tersor.tokencomp.matcher.assignment import Assignment


@dataclass(frozen=True)
class Bipartite:
    """Bipartite soft matching: tokens at even positions (A) each find their most similar one at odd positions (B) by
    cosine, and the r best of these edges are merged. Several of A may go into the same one of B.

    Source: arXiv:2210.09461, section 3. New order: protected, what is left of A, B. So it is in the authors' code when
    there is a class token; without one, theirs leaves A in the order of the scores, ours in that of the sequence. Ties
    go to the earlier token, similarities are float32 at least, and any number of protected tokens is served.
    """

    def match(self, features: Tensor, r: int, num_protected: int) -> Assignment:
        features = features.detach()
        place = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        in_a, in_b = (slice(num_protected + (num_protected + odd) % 2, None, 2) for odd in (0, 1))
        score, nearest = bipartite_match(features[:, in_a], features[:, in_b])
        order = score.argsort(dim=-1, descending=True, stable=True)
        merged, left = order[:, :r], order[:, r:].sort(dim=-1).values
        a, b = place[:, in_a], place[:, in_b]
        kept = torch.cat([place[:, :num_protected], a.gather(1, left), b], 1)
        return Assignment(a.gather(1, merged), b.gather(1, nearest.gather(1, merged)), kept)

    def limit(self, num_tokens: int, num_protected: int) -> int:
        """Half of the tokens that are not protected: A without the protected ones is never smaller."""
        return max(0, num_tokens - num_protected) // 2

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        a = -(-num_tokens // 2) - -(-num_protected // 2)
        return a * (num_tokens - num_protected - a) * dim
