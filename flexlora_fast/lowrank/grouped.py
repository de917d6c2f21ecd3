"""All layers of one shape in one solve, certified like single ones; those that need a closer look get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexlora_fast.backends import groups
from flexlora_fast.backends.group import Group
from flexlora_fast.lowrank import filtered
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.stack import Stack


class Layers(Protocol):
    """Layers of one shape (m, n), by their place: what all are made of at once, or one of them as a stack.

    ``ranks``: R of each. ``batches``: matrices of each (experts, or 1).
    """

    @property
    def m(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def ranks(self) -> Sequence[int]: ...

    @property
    def batches(self) -> Sequence[int]: ...

    def group(self, places: Sequence[int]) -> Group: ...

    def stack(self, place: int) -> Stack: ...


@dataclass(frozen=True)
class Stacks:
    """Layers that are stacks already."""

    stacks: Sequence[Stack]

    @property
    def m(self) -> int:
        return self.stacks[0].m

    @property
    def n(self) -> int:
        return self.stacks[0].n

    @property
    def ranks(self) -> list[int]:
        return [stack.R for stack in self.stacks]

    @property
    def batches(self) -> list[int]:
        return [stack.batch for stack in self.stacks]

    def group(self, places: Sequence[int]) -> Group:
        return groups.of([self.stacks[i] for i in places])

    def stack(self, place: int) -> Stack:
        return self.stacks[place]


def solve_group(
    layers: Layers, rank: int, *, tol: float, seed: int, names: Sequence[str], certificate: str = "exact"
) -> list[Factorization]:
    """The best rank-``rank`` approximation of every layer, as ``solve`` gives it for one.

    All go through ``filtered`` together, on the device of their factors, which is waited for once. Layers whose numbers
    do not prove them good go through it once more with longer filters, and then one by one to ``solve``, whose solvers
    look at what they do: the result names them.

    Args:
        names: of the layers, for random addresses and errors.
        certificate: what such a single layer is solved with; here ‖ΔW‖_F² is computed in any case.

    Raises:
        AdapterError: a factor is not finite, or ΔW is too large for float32.
    """
    tol = max(tol, FLOAT32_TOL)
    k = min(rank, layers.m, layers.n)
    results: list[Factorization | None] = [None] * len(names)
    # Fewer columns than the iteration needs have an eigenproblem of their own size.
    left = [i for i, R in enumerate(layers.ranks) if filtered.takes(R, layers.m, layers.n, k)]
    for more in filtered.MORE:
        if not left:
            break
        keys = [stream(seed, names[i]) for i in left]
        batches = [layers.batches[i] for i in left]
        found = filtered.solve_filtered(layers.group(left), batches, k, keys, tol, more)
        for i, result in zip(left, found, strict=True):
            results[i] = result
        left = [i for i in left if results[i] is None]
    return [
        result or solve(layers.stack(i), rank, tol=tol, seed=seed, name=names[i], certificate=certificate)
        for i, result in enumerate(results)
    ]
