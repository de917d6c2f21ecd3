"""FLoRA: the stack itself goes into every client's frozen weights, and adapters begin anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.lowrank.accumulate import Accumulator
from flexlora_fast.methods.base import Base, Contribution, Method, Solve
from flexlora_fast.methods.flexlora import exact_blocks
from flexlora_fast.stack import Block, Stack


class FLoRA(Method):
    """ΔW = Σ_i w_i·s_i·B_i·A_i = [w_1·s_1·B_1 … w_K·s_K·B_K]·[A_1; …; A_K], which clients add to their frozen weights.

    Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
    NeurIPS 2024 (arXiv 2409.05976). Exact for any mix of ranks; the download grows with Σ r_i, up to a dense ΔW, which
    is sent in place of factors that would be larger. New adapters are random by seed, layer and client: give each
    round another ``seed``, or all rounds begin in the same directions.
    """

    name = "flora"
    summary = "exact sum, added to every client's frozen weights; adapters begin anew (mixed ranks, large downloads)"
    use = "across silos with fast links, where nothing may be cut off and clients may change their base weights"
    source = "Wang et al., NeurIPS 2024, arXiv 2409.05976"
    clients = "add base_delta to their frozen weights after each round (update.merge_into)"
    output = "fresh"
    merges = linear = True

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        return exact_blocks(contributions)

    def base(self, contributions: Sequence[Contribution], stack: Stack, solve: Solve) -> Base:
        return Base(whole(stack))


def whole(stack: Stack) -> tuple[Tensor, ...]:
    """ΔW of a stack as P·√d and √d·Q, float32 on the CPU, or as one matrix (b, m, n) where that is not larger."""
    if stack.R * (stack.m + stack.n) < stack.m * stack.n:
        root = stack.d.abs().sqrt().to(stack.device)
        P = stack.packed_P(torch.float64) * (root * stack.d.to(root).sign())
        Q = stack.packed_Q(torch.float64) * root.unsqueeze(1)
        return P.float().cpu(), Q.float().cpu()
    total = Accumulator(stack.m, stack.n, stack.batch, stack.device)
    total.add(stack)
    return (total.matrix.mul_(math.ldexp(1.0, total.exponent or 0)).cpu(),)
