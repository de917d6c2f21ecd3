"""A round on several devices and hosts, over torch.distributed.

Every rank is called with the same clients. Layers are shared out by what they cost, each solved by one rank, which
reads the clients' factors itself; the first rank gets the update. Layers that do not fit one rank's memory are solved
by all of them, each with some of the clients (``shard``).

Layers are solved as one process solves them: with the same versions, kind of machine, device and number of threads the
result is the same bit for bit, however many ranks there are. Sums over ranks (``shard="clients"``, and the Gram matrix
of a defence) are the same to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexlora_fast.distributed.rounds import Aggregator
from flexlora_fast.distributed.team import TIMEOUT, Team
from flexlora_fast.gate.entrance import Source
from flexlora_fast.oneshot import fill
from flexlora_fast.update import GlobalUpdate

__all__ = ["TIMEOUT", "Aggregator", "Team", "aggregate"]


def aggregate(
    adapters: Iterable[Source],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    *args: Any,
    clients: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    shard: str = "auto",
    timeout: float = TIMEOUT,
    **options: Any,
) -> GlobalUpdate | None:
    """``ff.aggregate``, to be called by all ranks of the default process group with the same arguments.

    Args:
        adapters: those in folders are read by the rank that needs them, so all must see the same files; those in memory
            must be in that of every rank.
        shard, args, options: as for :class:`Aggregator`.
        out: written by the first rank.
        timeout: seconds that a rank may be silent until it counts as lost; one that works is not silent.

    Returns:
        The update on the first rank, None on the others.

    Raises:
        What ``ff.aggregate`` raises, the same on all ranks. DistributedError: there is no process group; the ranks were
        not called with the same round; one of them failed, died or hangs. Then no rank has a result; ``out`` is
        whole, or what it was before.
    """
    with Team(timeout) as team, team.agreed():
        round_ = Aggregator(team, *args, shard=shard, **options)
        fill(round_, adapters, weights, clients)
        return round_.finish(out)
