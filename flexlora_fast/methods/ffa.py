"""FFA-LoRA: A is frozen and the same for all, so that the average of B alone is exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.errors import OptionError
from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.stack import Block


class FFALoRA(Method):
    """ΔW = (Σ_i w_i·s_i·B_i)·A with one frozen A, of which a client of rank r_i has the first r_i rows.

    Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313), for
    equal ranks; smaller ones are slices of A, their B padded with zeros. Adapters have the clients' own A, unchanged.
    """

    name = "ffa-lora"
    summary = "A frozen and shared, average of B: exact, half the upload, less expressive (mixed ranks by slices of A)"
    use = "slow links, or noise on uploads: a sum that is linear in what is sent"
    source = "Sun et al., ICLR 2024, arXiv 2403.12313"
    clients = "start from one A and train B alone"
    output = "slice"
    trains = ("B",)
    gauge_invariant = stacked = False
    linear = True

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        if not contributions:
            return []
        A = shared(contributions)
        B = torch.zeros(*contributions[0].B.shape[:2], A.shape[1], dtype=torch.float64, device=A.device)
        for c in contributions:
            B[:, :, : c.rank] += c.weight * c.scale * c.B.double()
        return [Block(B.float(), A.float(), torch.ones(B.shape[2], dtype=torch.float64))]


def shared(contributions: Sequence[Contribution]) -> Tensor:
    """The A (b, r, n) of the largest rank, once all others are known to be its first rows, to the rounding of dtypes.

    Raises ``OptionError`` naming a client whose A is another.
    """
    widest = max(c.rank for c in contributions)
    first = min((c for c in contributions if c.rank == widest), key=lambda c: torch.finfo(c.A.dtype).eps)
    for c in contributions:
        here = first.A[:, : c.rank]
        coarser = max((c.A.dtype, here.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        info = torch.finfo(coarser)
        if not torch.allclose(c.A.double(), here.double(), rtol=info.eps, atol=info.smallest_normal * info.eps):
            off = float((c.A.double() - here.double()).abs().max())
            raise OptionError(
                f"ffa-lora averages B over one frozen A, and that of {c.client!r} differs from that of "
                f"{first.client!r} by up to {off:.3g}; have clients start from one A and train B alone "
                "(requires_grad_(False) on lora_A), or use method 'flexlora'",
                client=c.client,
            )
    return first.A
