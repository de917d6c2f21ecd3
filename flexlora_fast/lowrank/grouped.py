"""All layers of one shape in one solve, certified like single ones; those that need a closer look get it."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora_fast.lowrank import filtered
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.stack import Stack


def solve_group(
    stacks: Sequence[Stack], rank: int, *, tol: float, seed: int, names: Sequence[str], certificate: str = "exact"
) -> list[Factorization]:
    """The best rank-``rank`` approximations of stacks of one m and n, as ``solve`` gives them one by one.

    All go through ``filtered`` together, on the device of their factors, which is waited for once. A layer whose
    numbers do not prove it good goes through it once more by itself with longer filters, and then to ``solve``, whose
    solvers look at what they do: its result names them.

    Args:
        names: of the layers, for random addresses and errors.
        certificate: what such a single layer is solved with; here ‖ΔW‖_F² is computed in any case.

    Raises:
        AdapterError: a factor is not finite, or ΔW is too large for float32.
    """
    tol = max(tol, FLOAT32_TOL)
    k = min(rank, stacks[0].m, stacks[0].n)
    results: list[Factorization | None] = [None] * len(stacks)
    # Fewer columns than the iteration needs have an eigenproblem of their own size.
    open_ = [i for i, stack in enumerate(stacks) if filtered.takes(stack, k)]
    for more in filtered.MORE:
        if open_:
            keys = [stream(seed, names[i]) for i in open_]
            found = filtered.solve_filtered([stacks[i] for i in open_], k, keys, tol, more)
            for i, result in zip(open_, found, strict=True):
                results[i] = result
            open_ = [i for i in open_ if results[i] is None]
    return [
        result or solve(stack, rank, tol=tol, seed=seed, name=name, certificate=certificate)
        for result, stack, name in zip(results, stacks, names, strict=True)
    ]
