"""What was set out to be reached, and what a run measured: computed from the results file, misses included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import ESTIMATED, OURS, PEERS
from benchmarks.text import Check

DENSE = "dense + linalg.svd"
# Excesses below this are the same: float32 does not resolve them.
_SAME = 1e-6
# Least ratio of a full SVD's time to ours, and of the fastest peer's that is as accurate.
_OVER_DENSE = {"silo": 400, "device": 150, "flat": 100, "paper": 8}
_OVER_PEERS = {"silo": 4, "device": 4, "wide": 4, "paper": 4}
_REGRET = 1.5

Results = dict[str, Any]


def rows(results: Results, kind: str) -> list[dict[str, Any]]:
    """The extra_info of the benchmarks of one kind."""
    found = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return [row for row in found if row.get("kind") == kind]


def one(results: Results, kind: str, workload: str) -> dict[str, Any] | None:
    return next((row for row in rows(results, kind) if row.get("workload") == workload), None)


def as_accurate(row: dict[str, Any], own: str) -> dict[str, float]:
    """Seconds of the peers whose excess is equal to ours or better."""
    bound = max(row["methods"][own]["excess"], _SAME)
    peers = {name: method for name, method in row["methods"].items() if name in PEERS}
    return {name: method["seconds"] for name, method in peers.items() if method["excess"] <= bound}


def _titled(title: str, own: str) -> str:
    return title if own == OURS else f"{title}, certificate estimated"


def over_dense(results: Results, workload: str, target: float, own: str = OURS) -> Check:
    name, goal = _titled(f"{workload}: over {DENSE}", own), f"≥ {target:g}×"
    row = one(results, "layer", workload)
    if row is None or not {DENSE, own} <= row["methods"].keys():
        return Check(name, goal, "not measured", None)
    ratio = row["methods"][DENSE]["seconds"] / row["methods"][own]["seconds"]
    return Check(name, goal, f"{ratio:.3g}×", ratio >= target)


def over_peers(results: Results, workload: str, target: float, own: str = OURS) -> Check:
    name, goal = _titled(f"{workload}: over the fastest peer as accurate", own), f"≥ {target:g}×"
    row = one(results, "layer", workload)
    peers = as_accurate(row, own) if row and own in row["methods"] else {}
    if row is None or not peers:
        return Check(name, goal, "not measured", None)
    best = min(peers, key=peers.__getitem__)
    ratio = peers[best] / row["methods"][own]["seconds"]
    return Check(name, goal, f"{ratio:.3g}× ({best})", ratio >= target)


def compute_floor(results: Results, found: dict[str, Any]) -> float | None:
    """Seconds of a round's flops at the rate of bfloat16 products: its factors are, and are multiplied as they are.

    The suite writes them at the float32 rate, which a round can beat.
    """
    limits = results["machine_info"]["limits"]
    at_float32 = found["compute_floor"]
    return None if at_float32 is None else at_float32 * limits["matrix_float32"] / limits["matrix_bfloat16"]


def round_checks(results: Results, workload: str = "round-7b") -> list[Check]:
    """Memory, wall time against the floors in both states of the page cache, and against the in-memory path."""
    row = one(results, "round", workload)
    checks = []
    for state in ("cold", "warm"):
        found = row and row["states"][state]
        name, goal = f"{workload}, {state}: wall", "≤ 1.5 × max(read, compute)"
        compute = compute_floor(results, found) if found else None
        if not found or compute is None:
            checks.append(Check(name, goal, "not measured", None))
            continue
        floor = max(found["read_floor"], compute)
        text = (
            f"{found['seconds'] / floor:.3g} × ({found['seconds']:.3g} s; read {found['read_floor']:.3g} s, "
            f"compute {compute:.3g} s)"
        )
        checks.append(Check(name, goal, text, found["seconds"] <= 1.5 * floor))
    peaks = [found["peak_bytes"] for found in row["states"].values()] if row else [None]
    name, goal = f"{workload}: peak resident memory", "≤ 2 GiB"
    if None in peaks:
        checks.append(Check(name, goal, "not measured", None))
    else:
        checks.append(Check(name, goal, f"{max(peaks) / 2**30:.2f} GiB", max(peaks) <= 2 * 2**30))
    name, goal = f"{workload}, warm: a layer against the in-memory path", "≤ 1.2 ×"
    if row is None:
        return [*checks, Check(name, goal, "not measured", None)]
    ratio = row["states"]["warm"]["seconds"] / row["in_memory_seconds"]
    return [*checks, Check(name, goal, f"{ratio:.3g} ×", ratio <= 1.2)]


def regret_check(results: Results) -> Check:
    found = rows(results, "planner")
    name, goal = "planner: time of its choice over the best solver's, worst workload", f"≤ {_REGRET:g} ×"
    if not found:
        return Check(name, goal, "not measured", None)
    worst = max(found, key=lambda row: row["regret"])
    text = f"{worst['regret']:.3g} × ({worst['workload']}: {worst['chosen']} chosen, {worst['best']} best)"
    return Check(name, goal, text, worst["regret"] <= _REGRET)


def both(check: Callable[..., Check], results: Results, workload: str, target: float) -> list[Check]:
    """With the exact certificate, and with an estimated one where that changes the solver."""
    row = one(results, "layer", workload)
    solvers = {row["methods"][own]["solver"] for own in (OURS, ESTIMATED) if own in row["methods"]} if row else set()
    return [check(results, workload, target, own) for own in ((OURS, ESTIMATED) if len(solvers) == 2 else (OURS,))]


def checks(results: Results) -> list[Check]:
    """Every target with what was measured."""
    return [
        *(check for name, goal in _OVER_DENSE.items() for check in both(over_dense, results, name, goal)),
        *(check for name, goal in _OVER_PEERS.items() for check in both(over_peers, results, name, goal)),
        *round_checks(results),
        regret_check(results),
    ]
