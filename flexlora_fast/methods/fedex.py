"""FedEx-LoRA: averaged factors as adapters, and what they miss of the mean update into the frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.errors import OptionError
from flexlora_fast.methods.averages import balanced, zero_padded
from flexlora_fast.methods.base import Base, Contribution, Method, Solve
from flexlora_fast.methods.flexlora import exact_blocks
from flexlora_fast.stack import Block, Stack


@dataclass(frozen=True)
class FedEx(Method):
    """Adapters Ā = Σ w_i·√s_i·A_i and B̄ = Σ w_i·√s_i·B_i, as FedIT's; and Σ w_i·s_i·B_i·A_i − B̄·Ā, which every client
    adds to its frozen weights, so that both together are the mean update.

    Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models", ACL 2025 (arXiv 2410.09432), for equal ranks. Here the residual is not formed: it is
    Σ w_i·(√s_i·B_i − B̄)·(√s_i·A_i − Ā) + (1 − Σ w_i)·B̄·Ā, without the cancellation of the published difference, and
    goes through the solver as factors.

    Args:
        residual: the most columns of the residual that are sent; None for all, which is exact. What is cut off is in
            ``error``.
    """

    residual: int | None = None

    name = "fedex-lora"
    summary = "average of A and of B, and their error added to every client's frozen weights (equal ranks); exact"
    use = "where ranks are equal, adapters must keep their basis and clients may change their base weights"
    source = "Singhal et al., ACL 2025, arXiv 2410.09432"
    clients = "add base_delta to their frozen weights after each round (update.merge_into)"
    output = "slice"
    merges = True
    mixed = gauge_invariant = False

    def __post_init__(self) -> None:
        number = isinstance(self.residual, int) and not isinstance(self.residual, bool)
        if self.residual is not None and not (number and self.residual >= 1):
            raise OptionError(
                f"fedex-lora: residual is {self.residual!r}; give an integer ≥ 1, or None for all columns"
            )

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        for c in contributions[1:]:
            if c.rank != contributions[0].rank:
                raise OptionError(
                    f"fedex-lora averages factors of equal ranks, and {c.client!r} has {c.rank} where "
                    f"{contributions[0].client!r} has {contributions[0].rank}; use method 'flexlora' or 'flora'"
                )
        return exact_blocks(contributions)

    def averages(self, contributions: Sequence[Contribution], stack: Stack) -> tuple[Tensor, Tensor]:
        B, A = zero_padded(contributions, [c.weight for c in contributions])
        return B.float(), A.float()

    def base(self, contributions: Sequence[Contribution], stack: Stack, solve: Solve) -> Base:
        rest = Stack(self.rest(contributions), stack.m, stack.n, stack.batch)
        f = solve(rest, min(self.residual or rest.R, rest.R, stack.m, stack.n))
        root = f.S.sqrt().to(f.U.device)
        P = (f.U.double() * root.unsqueeze(1)).float()
        Q = (f.V.double() * root.unsqueeze(1)).mT.float()
        energy = float(f.energy.sum())
        if f.energy_error is not None:  # estimated: what is cut off is bounded by three standard errors more
            energy += 3 * float(f.energy_error.square().sum().sqrt())
        return Base((P.cpu(), Q.cpu()), max(0.0, energy - float(f.S.square().sum())) ** 0.5)

    def rest(self, contributions: Sequence[Contribution]) -> list[Block]:
        """The residual's blocks, float32."""
        weights = [c.weight for c in contributions]
        mean_B, mean_A = zero_padded(contributions, weights)
        # What is missing from Σ w = 1 counts as clients of zeros.
        parts = [(torch.zeros_like(mean_B), torch.zeros_like(mean_A), max(0.0, 1.0 - sum(weights)))]
        parts += [(*balanced(c), c.weight) for c in contributions]
        return [
            Block((B - mean_B).float(), (A - mean_A).float(), torch.full((B.shape[2],), w, dtype=torch.float64))
            for B, A, w in parts
            if w > 1e-12
        ]
