"""FedIT: A and B averaged each for itself, the baseline that FlexLoRA was proposed against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexlora_fast.methods.averages import zero_padded
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
    use = "as a baseline: what plain FedAvg of LoRA factors does"
    source = "Zhang et al., ICASSP 2024, arXiv 2305.05644"
    output = "slice"
    gauge_invariant = stacked = False
    linear = True

    def weights(self, contributions: Sequence[Contribution]) -> list[float]:
        """The share of each contribution; sums to what the contributions' own weights sum to."""
        return [c.weight for c in contributions]

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        if not contributions:
            return []
        B, A = zero_padded(contributions, self.weights(contributions))
        return [Block(B.float(), A.float(), torch.ones(B.shape[2], dtype=torch.float64))]
