"""FFA-LoRA: A is frozen and the same for all, so that the average of B alone is exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.errors import IncompatibleAdapterError
from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.stack import Block


class FFALoRA(Method):
    """ΔW = (Σ_i w_i·s_i·B_i)·A with one frozen A, of which a client of rank r_i has the first r_i rows.

    Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313), for
    equal ranks; smaller ones are slices of A, their B padded with zeros. Adapters have the clients' own A, unchanged.
    """

    name = "ffa-lora"
    summary = "A frozen and shared, average of B: exact, half the upload, less expressive (mixed ranks by slices of A)"
    use = "where links are slow, or uploads are noised: what is sent goes into the sum linearly"
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


_HANDED_OUT = torch.finfo(torch.float32).eps  # adapters are float32 at most, whatever their clients have


def shared(contributions: Sequence[Contribution]) -> Tensor:
    """The A (b, r, n) of the largest rank, once all others are known to be its first rows, to the rounding of dtypes.

    Raises ``IncompatibleAdapterError`` for the client whose A differs from those of most others.
    """
    widest = max(c.rank for c in contributions)
    first = min((c for c in contributions if c.rank == widest), key=lambda c: torch.finfo(c.A.dtype).eps)
    if all(_same(c, first) for c in contributions):
        return first.A
    against = {c.client: [x for x in contributions if not _same(c, x)] for c in contributions}
    worst = max(contributions, key=lambda c: len(against[c.client]))
    other = against[worst.client][0]
    rank = min(worst.rank, other.rank)
    off = float((worst.A[:, :rank].double() - other.A[:, :rank].double()).abs().max())
    raise IncompatibleAdapterError(
        f"ffa-lora averages B over one frozen A, and this one's differs from those of {len(against[worst.client])} of "
        f"{len(contributions) - 1} others (by up to {off:.3g} from that of {other.client!r}); have clients start from "
        "one A and train B alone (requires_grad_(False) on lora_A), or use method 'flexlora'",
        client=worst.client,
    )


def _same(one: Contribution, other: Contribution) -> bool:
    """Whether the rows that both have are equal, to the rounding of their dtypes."""
    rank = min(one.rank, other.rank)
    # bfloat16 is coarse everywhere, float16 where values are small.
    infos = [torch.finfo(c.A.dtype) for c in (one, other)]
    relative, absolute = max(i.eps for i in infos), max(i.smallest_normal * i.eps for i in infos)
    X, Y = (c.A[:, :rank].double() for c in (one, other))
    return torch.allclose(X, Y, rtol=max(relative, _HANDED_OUT), atol=absolute)
