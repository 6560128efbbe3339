"""Two sets of tokens, edges only between them: no clustering, no iterations."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tersor.tokencomp.matcher.assignment import Assignment


@dataclass(frozen=True)
class Bipartite:
    """Bipartite soft matching: tokens at even positions (A) each find their most similar one at odd positions (B) by
    cosine, and the r best of these edges are merged. Several of A may go into the same one of B.

    Source: arXiv:2210.09461, section 3. New order: protected, what is left of A, B. So it is in the authors' code when
    there is a class token; without one, theirs leaves A in the order of the scores, ours in that of the sequence. Ties
    go to the earlier token, similarities are float32 whatever the model computes in, and any number of protected tokens
    is served.
    """

    def match(self, features: Tensor, r: int, num_protected: int) -> Assignment:
        # float32: half precision has too many ties, and its eps of 1e-12 would be 0
        m = normalize(features.detach().float(), dim=-1)
        place = torch.arange(num_protected, features.shape[1], device=features.device)
        a, b = place[place % 2 == 0], place[place % 2 == 1]
        score, nearest = (m[:, a] @ m[:, b].mT).max(-1)  # (batch, |A|); of equal ones max gives the first
        order = score.argsort(dim=-1, descending=True, stable=True)
        merged, left = order[:, :r], order[:, r:].sort(dim=-1).values
        prefix = torch.arange(num_protected, device=features.device)
        kept = torch.cat([prefix.expand(len(m), -1), a[left], b.expand(len(m), -1)], 1)
        return Assignment(a[merged], b[nearest.gather(1, merged)], kept)

    def limit(self, num_tokens: int, num_protected: int) -> int:
        """Half of the tokens that are not protected: A without the protected ones is never smaller."""
        return max(0, num_tokens - num_protected) // 2

    def macs(self, num_tokens: int, num_protected: int, dim: int) -> int:
        a = -(-num_tokens // 2) - -(-num_protected // 2)
        return a * (num_tokens - num_protected - a) * dim
