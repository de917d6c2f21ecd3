"""The single-layer workloads on the GPU: ours and the peers in alternation, and everybody's excess in float64 there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import costs
from benchmarks.gpu import stage
from benchmarks.gpu.peers import FULL_SVD, GPU_METHODS, obstacle, pilot_rate, svd_flops
from benchmarks.gpu.stage import Deadline, Options, Report, wall
from benchmarks.peers import ESTIMATED, OURS, Answer
from benchmarks.truth import Truth
from benchmarks.workloads import FULL, QUICK, Clients, Workload

# Timed repeats of a method and seconds of them: enough for a median, few enough that all workloads fit their time.
_TURNS, _BUDGET = 9, 0.5
# Seconds that a full SVD may take; some of the time is left for the workloads that follow.
_LONGEST = 20.0

# Flop/s of a method, or why there is none.
Rates = dict[str, float | str]


def pilot_rates(options: Options) -> Rates:
    """Of the methods whose time has to be predicted."""
    rates: Rates = {}
    for name in FULL_SVD:
        if obstacle(name, options) is None:
            try:
                rates[name] = pilot_rate(name, options)
            except Exception as error:
                rates[name] = failure(error)
    return rates


def failure(error: Exception) -> str:
    """Why a peer is not in the table: what it raised, in a line."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def reason_not_to_run(name: str, workload: Workload, rates: Rates, deadline: Deadline, options: Options) -> str | None:
    """Why a method is not run: what it lacks, its memory, or the time that it would take."""
    if reason := obstacle(name, options):
        return reason
    layer = costs.layer_of(workload)
    needed = costs.needed_bytes(name, layer)
    if options.cuda and needed > torch.cuda.mem_get_info()[0]:
        return f"needs {needed / 2**30:.0f} GiB"
    if name in FULL_SVD:
        rate = rates[name]
        if isinstance(rate, str):
            return rate
        predicted = svd_flops(layer) / rate
        if predicted > min(_LONGEST, deadline.left):
            return f"predicted {predicted:.0f} s"
    elif name != OURS and deadline.left < 1:
        return "no time left"
    return None


def first_run(
    name: str, clients: Clients, workload: Workload, truth: Truth, device: str
) -> tuple[Callable[[], Answer], dict[str, Any]]:
    """The method's call, and what one run of it says: with kernels compiled and libraries loaded."""
    call = GPU_METHODS[name](clients, workload.k)
    if name not in FULL_SVD:  # their pilot was one
        call()
    answers: list[Answer] = []
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = wall(lambda: answers.append(call()), device)
    peak = torch.cuda.max_memory_allocated() - before if device.startswith("cuda") else None
    (answer,) = answers
    return call, {
        "first_seconds": seconds,
        "peak_bytes": peak,  # as torch's allocator sees it: CuPy's own pool is not in it
        "excess": truth.excess(answer.B, answer.A, workload.k),
        "solver": answer.solver,
        "steps": answer.steps,
    }


def alternate(calls: dict[str, Callable[[], Answer]], rows: dict[str, dict[str, Any]], device: str, turns: int) -> None:
    """Time the calls in turn, slow ones less often or not again: their first run stands."""
    repeats = {name: min(turns, int(_BUDGET / max(row["first_seconds"], 1e-6))) for name, row in rows.items()}
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if turn < repeats[name]:
                taken[name].append(wall(call, device))
    for name, row in rows.items():
        row["all_seconds"] = taken[name] or [row["first_seconds"]]
        row["seconds"] = statistics.median(row["all_seconds"])


def measure_layer(
    workload: Workload, names: Sequence[str], rates: Rates, options: Options, deadline: Deadline
) -> dict[str, Any]:
    """What is found of some methods on one workload, as the CPU suite writes it."""
    clients = workload.clients(options.device)
    truth = Truth(clients)
    calls, rows, not_run = {}, {}, {}
    for name in names:
        if reason := reason_not_to_run(name, workload, rates, deadline, options):
            not_run[name] = reason
            continue
        try:
            calls[name], rows[name] = first_run(name, clients, workload, truth, options.device)
        except Exception as error:  # whatever a peer raises, the others are still to be measured
            if name in (OURS, ESTIMATED):
                raise
            not_run[name] = failure(error)
    tail = (truth.tail(workload.k) / truth.energy) ** 0.5
    del truth
    alternate(calls, rows, options.device, 2 if options.quick else _TURNS)
    return {"tail": tail, "methods": rows, "not_run": not_run}


def measure(options: Options, report: Report) -> None:
    """Every workload with the methods of milliseconds, in alternation; then with those that take a full SVD.

    In that order, so that where full SVDs outlast the stage's time, nothing else is lost.
    """
    deadline = Deadline(0.85 * options.seconds)
    rates = report["svd_rates"] = pilot_rates(options)
    workloads = QUICK if options.quick else FULL
    rows = {workload.name: layer_row(workload) for workload in workloads}
    report["layers"] = list(rows.values())
    smallest_first = sorted(workloads, key=lambda workload: workload.m * workload.n)
    for names in ([name for name in GPU_METHODS if name not in FULL_SVD], FULL_SVD):
        for workload in smallest_first:
            with report.attempt(f"{workload.name}: {names[0]} …"):
                found = measure_layer(workload, names, rates, options, deadline)
                row = rows[workload.name]
                row["shape"]["tail"] = found["tail"]
                row["methods"] |= found["methods"]
                row["not_run"] |= found["not_run"]
                learn(rates, found["methods"], workload)
                report.write()
                print(f"{workload.name}: {', '.join(found['methods'])}; {deadline.left:.0f} s left", flush=True)
            if options.cuda:
                torch.cuda.empty_cache()


def learn(rates: Rates, rows: dict[str, dict[str, Any]], workload: Workload) -> None:
    """Better rates from what was just run: a full SVD's rises with its size."""
    for name, row in rows.items():
        before = rates.get(name)
        if isinstance(before, float):
            rates[name] = max(before, svd_flops(costs.layer_of(workload)) / row["first_seconds"])


def layer_row(workload: Workload) -> dict[str, Any]:
    """The row of a workload that nothing was measured of yet."""
    shape = {"m": workload.m, "n": workload.n, "R": workload.R, "k": workload.k, "spectrum": workload.spectrum}
    shape |= {"clients": len(workload.ranks), "ranks": sorted(set(workload.ranks))}
    return {"kind": "layer", "workload": workload.name, "shape": shape, "methods": {}, "not_run": {}}


if __name__ == "__main__":
    stage.run(measure)
