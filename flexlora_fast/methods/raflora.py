"""raFLoRA: each column averaged over the clients that have it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.stack import Block


class RaFLoRA(Method):
    """ΔW = Σ_j (Σ_{i: r_i > j} w_i·s_i·b_ij·a_ijᵀ) / W_j, with W_j = Σ_{i: r_i > j} w_i over Σ_i w_i.

    Column j of B_i, b_ij, and row j of A_i count by the client's share among those whose rank reaches it, so that the
    columns that only large ranks have are not thinned out by the others: what the paper calls rank collapse. In its
    words, rank slice [l, h) is averaged over the clients with r_i ≥ h; ranks between two neighbours make no difference.

    Source: "raFLoRA", arXiv 2602.13486; rank-balanced weights of components also in "RB-LoRA" (Findings of EACL 2026).
    It takes column j of every client for the same direction. After a round they nearly are, as all began with the
    leading singular triplets of one ΔW; in the first round, and for clients that reorder columns, they are not.
    """

    name = "raflora"
    summary = "sum with each rank slice averaged over those clients that have it, then SVD (mixed ranks)"
    use = "where few clients have large ranks, and their last columns are to count in full"
    source = "raFLoRA, 2026, arXiv 2602.13486"
    gauge_invariant = False

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        order = sorted(contributions, key=lambda c: c.rank)
        ranks = [c.rank for c in order]
        behind = [0.0]  # W_j of the last 0, 1, … clients in this order
        for c in reversed(order):
            behind.append(behind[-1] + c.weight)
        widest = max(ranks, default=0)
        reach = [behind[len(order) - bisect.bisect_right(ranks, j)] for j in range(widest)]

        def among(c: Contribution) -> Tensor:
            # Shares first: of clients of the tiniest weights, 1/W_j has no float64.
            shares = [c.weight / total if total > 0 else 0.0 for total in reach[: c.rank]]
            return behind[-1] * c.scale * torch.tensor(shares, dtype=torch.float64)

        return [Block(c.B, c.A, among(c)) for c in contributions]
