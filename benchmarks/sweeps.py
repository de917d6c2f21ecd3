"""Time along one axis: the number of clients, their rank, the layer's width."""

from __future__ import annotations

import time

from benchmarks import costs, layers
from benchmarks.machine import Limits
from benchmarks.peers import METHODS, OURS
from benchmarks.workloads import SWEEPS, sweep

SWEPT = (OURS, "dense + linalg.svd", "QR + QR + core SVD", "two-stage sketch", "PROPACK on the factors")
# Seconds of one run beyond which a method is left out at the points that follow.
_BOX = 4.0


def run(axis: str, quick: bool, limits: Limits, pause: float) -> dict[str, dict[str, float]]:
    """By method: median seconds by point, as far as the method stayed inside the box."""
    found: dict[str, dict[str, float]] = {name: {} for name in SWEPT}
    dropped: set[str] = set()
    for point in SWEEPS[quick][axis]:
        workload = sweep(axis, point, quick)
        clients, k = workload.clients(), workload.k
        calls, repeats = {}, {}
        for name in SWEPT:
            if name in dropped or costs.predicted_seconds(name, costs.layer_of(workload), limits) > _BOX:
                continue
            calls[name] = METHODS[name](clients, k)
            start = time.perf_counter()
            calls[name]()  # warm-up, and how long it takes
            seconds = time.perf_counter() - start
            repeats[name] = 1 if seconds > 1 else 3
            if seconds > _BOX:
                dropped.add(name)
        for name, seconds in layers.alternate(calls, repeats, pause).items():
            found[name][str(point)] = seconds
    return found
