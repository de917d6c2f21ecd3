"""Methods that average the factors themselves: the baselines that FlexLoRA was proposed against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.stack import Block


class FedIT(Method):
    """ΔW = (Σ_i w_i·√s_i·B_i)·(Σ_i w_i·√s_i·A_i), smaller ranks padded with zeros.

    Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (arXiv 2305.05644), where
    ranks and scales are equal; √s on each factor is the reading of it for unequal scales, and changes nothing for
    equal ones. The cross terms B_i·A_j make it differ from the mean update.
    """

    name = "fedit"
    summary = "average of A and of B (zero-padded); biased by cross terms, for comparison and equal ranks"
    output = "slice"
    gauge_invariant = False
    linear = True

    def weights(self, contributions: Sequence[Contribution]) -> list[float]:
        """The share of each contribution; sums to what the contributions' own weights sum to."""
        return [c.weight for c in contributions]

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        if not contributions:
            return []
        rank = max(c.rank for c in contributions)
        first = contributions[0]
        B = torch.zeros(*first.B.shape[:2], rank, dtype=torch.float64, device=first.B.device)
        A = torch.zeros(first.A.shape[0], rank, first.A.shape[2], dtype=torch.float64, device=first.A.device)
        for c, weight in zip(contributions, self.weights(contributions), strict=True):
            root = abs(c.scale) ** 0.5
            B[:, :, : c.rank] += weight * root * (1 if c.scale >= 0 else -1) * c.B.double()
            A[:, : c.rank] += weight * root * c.A.double()
        return [Block(B.float(), A.float(), torch.ones(rank, dtype=torch.float64))]


class HetLoRA(FedIT):
    """The zero-padded average with weights ∝ w_i·‖ΔW_i‖_F, and each client sent the first columns of its rank.

    Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024
    (arXiv 2401.06432), "sparsity-weighted aggregation": p_i = ‖S_i‖/Σ‖S_j‖ with S_i the singular values of B_i·A_i.
    The data weight w_i is kept as a factor, so that a client of weight 0 counts as absent; with equal data weights
    the rule is the published one. Rank self-pruning happens in client training and is not part of aggregation.
    """

    name = "hetlora"
    summary = "zero-padded average weighted by each update's norm, cut by slicing; for comparison"
    linear = False

    def weights(self, contributions: Sequence[Contribution]) -> list[float]:
        total = sum(c.weight for c in contributions)
        raw = [c.weight * update_norm(c) for c in contributions]
        norm = sum(raw)
        if norm == 0:  # every update is zero: nothing to weigh by
            return [c.weight for c in contributions]
        return [total * value / norm for value in raw]


def update_norm(c: Contribution) -> float:
    """‖s·B·A‖_F from r×r Grams in float64: √Σ (BᵀB)∘(AAᵀ), no dense matrix."""
    B, A = c.B.double(), c.A.double()
    inner: Tensor = ((B.mT @ B) * (A @ A.mT)).sum()
    return abs(c.scale) * float(inner.clamp_min(0).sqrt())
