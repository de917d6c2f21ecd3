"""Who counts in a round, by how much, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora_fast import admission
from flexlora_fast.errors import EmptyRoundError, QuorumError, WeightError
from flexlora_fast.refusals import Refusals
from flexlora_fast.work import Client


def weighted(clients: Mapping[str, Client], refused: Refusals, *, normalised: bool) -> list[Client]:
    """The clients of positive weight with their ``share`` set, in canonical order: sums come out the same whatever the
    order of arrival. Weight 0 equals absent.

    ``normalised``: shares sum to 1. Otherwise they are the weights as they are, and nobody is missed.

    Raises:
        EmptyRoundError: there are no clients. WeightError: all their weights are zero.
    """
    counting = [clients[name] for name in sorted(clients) if clients[name].weight > 0]
    if not normalised:
        for client in counting:
            client.share = client.weight
        return counting
    if not clients:
        first = f", the first: {refused[0].reason}" if refused else ""
        others = f"; {refused.total} were refused{first}" if refused else ""
        raise EmptyRoundError(f"no client is in this round{others}; add at least one adapter")
    if not counting:
        raise WeightError(f"the weights of {len(clients)} clients sum to 0; they must sum to > 0")
    for client, share in zip(counting, admission.normalised([client.weight for client in counting]), strict=True):
        client.share = share
    return counting


def check_quorum(clients: Sequence[Client], min_clients: int, min_weight: float) -> None:
    """Raise ``QuorumError`` where those that the update would be made of are too few, or weigh too little."""
    weight = sum(client.weight for client in clients)  # which may be infinite
    if len(clients) < min_clients or weight < min_weight:
        raise QuorumError(
            f"{len(clients)} clients of weight {weight:g} in all are there, the round asks for {min_clients} "
            f"of {min_weight:g}; wait for more, or lower min_clients or min_weight"
        )
