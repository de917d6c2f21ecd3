"""One layer, every method: first runs in another process, then timed in alternation in this one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import costs
from benchmarks.fresh import Fresh, OverLimit
from benchmarks.machine import Limits
from benchmarks.peers import METHODS, OURS, Answer
from benchmarks.truth import Truth
from benchmarks.workloads import AnyWorkload, Workload

# A peer predicted or found to take longer than this is listed as not run.
TIME_BOX = 45.0
# A peer needing more than this is listed as not run.
MEMORY_BOX = 16 * 2**30
# Seconds between two methods; OpenMP's workers spin for 0.2 by default.
SETTLE = 0.4
# Seconds of timed repeats a method gets at most, beyond its first run. One whose first took longer than ``_ONCE`` gets
# none: a noisy neighbour does not move half a minute, and against the others it is only a large ratio.
_BUDGET = 6.0
_ONCE = 15.0

_TINY = Workload("warm-up", 48, 40, (2, 3), 4)


def settle(seconds: float) -> None:
    """Let the thread pools of the method before come to rest.

    Workers of OpenBLAS and OpenMP spin on for a while, which tripled the time of whatever followed PROPACK.
    """
    time.sleep(seconds)


@dataclass
class Alternation:
    """Calls timed in turn: every turn runs each call that still has repeats left, so that a noisy neighbour hits all.

    pytest-benchmark times one call at a time. So ours is what it times, and ``turn`` is its setup: before each timed
    round of ours the others have theirs. The others' seconds are in ``seconds``, all in the same clock.
    """

    calls: Mapping[str, Callable[[], object]]
    repeats: Mapping[str, int]
    pause: float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def turn(self) -> None:
        """One turn of the others, and a pause so that the next one timed starts from rest."""
        for name, call in self.calls.items():
            done = self.seconds.setdefault(name, [])
            if len(done) < self.repeats[name]:
                settle(self.pause)
                start = time.perf_counter()
                call()
                done.append(time.perf_counter() - start)
        settle(self.pause)

    def run(self, own: str, call: Callable[[], object], turns: int, benchmark: Any) -> dict[str, list[float]]:
        """Time ``call`` through pytest-benchmark, the others in between; seconds of all."""
        benchmark.pedantic(call, setup=self.turn, rounds=turns, warmup_rounds=0)
        return {own: list(benchmark.stats.stats.data)} | self.seconds


def alternate(calls: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], pause: float) -> dict[str, float]:
    """Median seconds of each call without pytest-benchmark: for comparisons inside a benchmark."""
    alternation = Alternation(calls, repeats, pause)
    for _ in range(max(repeats.values(), default=0)):
        alternation.turn()
    return {name: statistics.median(seconds) for name, seconds in alternation.seconds.items() if seconds}


def prepare(name: str, workload: AnyWorkload) -> Callable[[], Answer]:
    """In the other process: imports, inputs and thread pools, then the call whose peak memory counts."""
    METHODS[name](_TINY.clients(), _TINY.k)()
    return METHODS[name](workload.clients(), workload.k)


def reason_not_to_run(name: str, workload: AnyWorkload, limits: Limits) -> str | None:
    """Why a method is not run here, from what is known before: its memory, or the rate of a full SVD."""
    layer = costs.layer_of(workload)
    needed = costs.needed_bytes(name, layer)
    if needed > MEMORY_BOX:
        return f"needs {needed / 2**30:.0f} GiB"
    predicted = costs.predicted_seconds(name, layer, limits)
    return f"predicted {predicted:.0f} s" if predicted > TIME_BOX else None


def first_runs(workload: AnyWorkload, limits: Limits) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By method: answer, seconds and peak memory of one run in another process; and the reasons for those not run."""
    done: dict[str, dict[str, Any]] = {}
    not_run = {}
    with Fresh() as process:
        for name in METHODS:
            reason = reason_not_to_run(name, workload, limits)
            if reason is None:
                process.prepare(prepare, name, workload)
                try:
                    outcome = process.run(TIME_BOX)
                    done[name] = {
                        "answer": outcome.value,
                        "first_seconds": outcome.seconds,
                        "peak_bytes": outcome.grown,
                    }
                except OverLimit:
                    reason = f"took more than {TIME_BOX:.0f} s"
            if reason is not None:
                not_run[name] = reason
    return done, not_run


def repeats_for(seconds: float, turns: int) -> int:
    """Timed repeats of a method: as many as the budget has room for; one at least, or none for the slowest."""
    return 0 if seconds > _ONCE else max(1, min(turns, int(_BUDGET / max(seconds, 1e-9))))


def measure(benchmark: Any, workload: AnyWorkload, limits: Limits, turns: int, pause: float) -> dict[str, Any]:
    """The row of one workload, also left in ``benchmark.extra_info``."""
    done, not_run = first_runs(workload, limits)
    clients = workload.clients()
    truth = Truth(clients)
    rows = {}
    for name, first in done.items():
        answer = first.pop("answer")
        layer = costs.layer_of(workload)
        work = costs.method_work(name, layer, answer.solver, answer.steps)
        flops, moved = work or (None, None)
        rows[name] = first | {
            "excess": truth.excess(answer.B, answer.A, workload.k),
            "solver": answer.solver,
            "steps": answer.steps,
            "flops": flops,
            "bytes": moved,
            "floor_seconds": limits.floor(*work) if work else None,
        }
    about = {"tail": (truth.tail(workload.k) / truth.energy) ** 0.5}
    del truth
    calls = {name: METHODS[name](clients, workload.k) for name in rows}
    repeats = {name: repeats_for(row["first_seconds"], turns) for name, row in rows.items()}
    for name, call in calls.items():  # slow ones gain nothing from it
        if repeats[name] > 2:
            call()
    own = calls.pop(OURS)
    seconds = Alternation(calls, repeats, pause).run(OURS, own, turns, benchmark)
    for name, row in rows.items():
        row["all_seconds"] = seconds.get(name) or [row["first_seconds"]]
        row["seconds"] = statistics.median(row["all_seconds"])
        row["share"] = row["floor_seconds"] and row["floor_seconds"] / row["seconds"]
    shape = {"m": workload.m, "n": workload.n, "R": workload.R, "k": workload.k, "spectrum": workload.spectrum}
    shape |= {"clients": len(workload.ranks), "ranks": sorted(set(workload.ranks))}
    benchmark.extra_info.update(
        kind="layer", workload=workload.name, shape=shape | about, methods=rows, not_run=not_run
    )
    return rows
