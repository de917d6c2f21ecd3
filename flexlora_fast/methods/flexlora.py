"""FlexLoRA: the exact weighted sum of the clients' updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.stack import Block


def exact_blocks(contributions: Sequence[Contribution]) -> list[Block]:
    """The factors as sent, every column of a client with the coefficient w·s."""
    return [Block(c.B, c.A, torch.full((c.rank,), c.weight * c.scale, dtype=torch.float64)) for c in contributions]


class FlexLoRA(Method):
    """ΔW = Σ_i w_i·s_i·B_i·A_i, so every column of client i has the coefficient w_i·s_i.

    Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources", NeurIPS 2024 (arXiv 2402.11505), equation 2, with PEFT's scale s_i in place of the paper's constant.
    """

    name = "flexlora"
    summary = "exact weighted sum of all updates; every client gets its best truncation (mixed ranks)"
    use = "by default: any mix of ranks, nothing asked of clients"
    source = "Bai et al., NeurIPS 2024, arXiv 2402.11505"
    folds = uniform = linear = True

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        return exact_blocks(contributions)
