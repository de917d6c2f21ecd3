"""Who does what: the same on all ranks, from what all of them know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from flexlora_fast.distributed.team import Team
from flexlora_fast.planning import LayerPlan, Settings, seconds


def balanced(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """A rank for each item, by the longest processing time first.

    Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969): the rank with most to
    do has at most 4/3 − 1/(3·ranks) of what the best shares would give it.

    >>> balanced({"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}, 2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    loads, owners = [0.0] * ranks, dict[str, int]()
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[name] = rank
        loads[rank] += costs[name]
    return owners


def runs(columns: Sequence[int], ranks: int) -> list[range]:
    """Neighbours for each rank, with about as many columns each.

    >>> runs([4, 4, 8, 2, 2], 2)
    [range(0, 2), range(2, 5)]
    """
    total, before, bounds = sum(columns), 0, [0] * (ranks + 1)
    for count in columns:
        middle = before + count / 2
        owner = min(ranks - 1, int(ranks * middle / total)) if total else 0
        for rank in range(owner + 1, ranks + 1):
            bounds[rank] += 1
        before += count
    return [range(lo, hi) for lo, hi in pairwise(bounds)]


def owners(team: Team, plans: Sequence[LayerPlan], of: Settings) -> dict[str, int]:
    """The rank of each layer, by the first rank's reckoning of what it costs."""
    return team.first(balanced({plan.spec.name: seconds(plan, of) for plan in plans}, team.size))


def owned(owners: Mapping[str, int], rank: int) -> frozenset[str]:
    return frozenset(name for name, owner in owners.items() if owner == rank)
