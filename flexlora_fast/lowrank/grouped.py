"""All layers of one shape in one solve, certified like single ones; those that need a closer look get it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flexlora_fast.backends import groups
from flexlora_fast.backends.group import Group
from flexlora_fast.lowrank import filtered
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.stack import Stack


@dataclass(frozen=True)
class How:
    """What solvers are told beside the rank; ``names`` are those of the layers, for random addresses and errors.

    ``certificate``: what a layer that is solved alone has; in groups ‖ΔW‖_F² is computed in any case.
    """

    tol: float
    seed: int
    names: Sequence[str]
    certificate: str = "exact"


class Layers(Protocol):
    """Layers of one shape (m, n), by their place.

    ``ranks``: R of each. ``batches``: matrices of each (experts, or 1). ``operand``: several of them, to be solved
    together: a group, or their dense ΔW (L, m, n). ``alone``: one of them solved by itself, by solvers that look at
    what they do.
    """

    @property
    def m(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def ranks(self) -> Sequence[int]: ...

    @property
    def batches(self) -> Sequence[int]: ...

    def operand(self, places: Sequence[int]) -> Group | Tensor: ...

    def alone(self, place: int, rank: int, how: How) -> Factorization: ...


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

    def operand(self, places: Sequence[int]) -> Group | Tensor:
        return groups.of([self.stacks[i] for i in places])

    def alone(self, place: int, rank: int, how: How) -> Factorization:
        return alone(self.stacks[place], place, rank, how)


def alone(stack: Stack, place: int, rank: int, how: How) -> Factorization:
    """``solve`` for the stack of the layer at this place."""
    return solve(stack, rank, tol=how.tol, seed=how.seed, name=how.names[place], certificate=how.certificate)


def solve_group(layers: Layers, rank: int, how: How) -> list[Factorization]:
    """``begin_group``, and its results."""
    return begin_group(layers, rank, how)()


def begin_group(layers: Layers, rank: int, how: How) -> Callable[[], list[Factorization]]:
    """Begin with the best rank-``rank`` approximations of layers of one shape; what is returned waits for them.

    All go through ``filtered`` together, on the device of their factors, and come as ``solve`` gives them for one.
    Layers whose numbers do not prove them good go through it once more with longer filters, and then each alone: the
    result names the solver.

    What is returned raises AdapterError: a factor is not finite, or ΔW is too large for float32.
    """
    tol = max(how.tol, FLOAT32_TOL)
    k = min(rank, layers.m, layers.n)
    keys = [stream(how.seed, name) for name in how.names]

    def launch(places: Sequence[int], more: int) -> filtered.Found:
        addresses = [(keys[i], b) for i in places for b in range(layers.batches[i])]
        return filtered.launch(layers.operand(places), addresses, k, tol, more)

    # Fewer columns than the iteration needs have an eigenproblem of their own size.
    able = [i for i, R in enumerate(layers.ranks) if filtered.takes(R, layers.m, layers.n, k)]
    launched = launch(able, filtered.MORE[0]) if able else None

    def results() -> list[Factorization]:
        found: dict[int, Factorization] = {}
        if launched is not None:
            found |= _collected(launched, layers, able, tol)
        for more in filtered.MORE[1:]:
            if left := [i for i in able if i not in found]:
                found |= _collected(launch(left, more), layers, left, tol)
        return [found.get(i) or layers.alone(i, rank, how) for i in range(len(layers.ranks))]

    return results


def _collected(launched: filtered.Found, layers: Layers, places: Sequence[int], tol: float) -> dict[int, Factorization]:
    """The results that proved good, by place."""
    results = filtered.collected(launched, [layers.batches[i] for i in places], tol)
    return {i: result for i, result in zip(places, results, strict=True) if result is not None}
