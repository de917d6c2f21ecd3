"""The single-layer workloads on the GPU: ours and the peers in alternation, and everybody's excess in float64 there."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import costs
from benchmarks.gpu import stage
from benchmarks.gpu.peers import FULL_SVD, GPU_METHODS, obstacle, pilot_rate, svd_flops
from benchmarks.gpu.stage import Deadline, Options, Report, wall
from benchmarks.peers import OURS, Answer
from benchmarks.truth import Truth
from benchmarks.workloads import FULL, QUICK, Clients, Workload

# Timed repeats of a method and seconds of them: enough for a median, few enough that all workloads fit their time.
_TURNS, _BUDGET = 9, 0.5
# Seconds that a full SVD may take; some of the time is left for the workloads that follow.
_LONGEST = 12.0


def reason_not_to_run(
    name: str, workload: Workload, rates: dict[str, float], deadline: Deadline, options: Options
) -> str | None:
    """Why a method is not run: what it lacks, its memory, or the time that it would take."""
    if reason := obstacle(name, options):
        return reason
    layer = costs.layer_of(workload)
    needed = costs.needed_bytes(name, layer)
    if options.cuda and needed > torch.cuda.mem_get_info()[0]:
        return f"needs {needed / 2**30:.0f} GiB"
    if name in FULL_SVD:
        predicted = svd_flops(layer) / rates[name]
        if predicted > min(_LONGEST, deadline.left):
            return f"predicted {predicted:.0f} s"
    elif name != OURS and deadline.left < 1:
        return "no time left"
    return None


def first_run(
    name: str, clients: Clients, workload: Workload, truth: Truth, device: str
) -> tuple[Callable[[], Answer], dict[str, Any]]:
    """The method's call, and what one run of it says."""
    call = GPU_METHODS[name](clients, workload.k)
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


def measure_layer(workload: Workload, rates: dict[str, float], options: Options, deadline: Deadline) -> dict[str, Any]:
    """The row of one workload, as the CPU suite writes it."""
    clients = workload.clients(options.device)
    truth = Truth(clients)
    calls, rows, not_run = {}, {}, {}
    for name in GPU_METHODS:
        if reason := reason_not_to_run(name, workload, rates, deadline, options):
            not_run[name] = reason
            continue
        try:
            calls[name], rows[name] = first_run(name, clients, workload, truth, options.device)
        except torch.cuda.OutOfMemoryError as error:
            if name == OURS:
                raise
            not_run[name] = f"out of memory: {str(error).splitlines()[0]}"
    shape = {"m": workload.m, "n": workload.n, "R": workload.R, "k": workload.k, "spectrum": workload.spectrum}
    shape |= {"clients": len(workload.ranks), "ranks": sorted(set(workload.ranks))}
    shape |= {"tail": (truth.tail(workload.k) / truth.energy) ** 0.5}
    del truth
    alternate(calls, rows, options.device, 2 if options.quick else _TURNS)
    return {"kind": "layer", "workload": workload.name, "shape": shape, "methods": rows, "not_run": not_run}


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.85 * options.seconds)
    rates = {name: pilot_rate(name, options) for name in FULL_SVD if obstacle(name, options) is None}
    report["svd_rates"] = rates
    report["layers"] = []
    for workload in QUICK if options.quick else FULL:
        report["layers"].append(measure_layer(workload, rates, options, deadline))
        report.write()
        print(f"{workload.name}: done, {deadline.left:.0f} s left", flush=True)
        if options.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    stage.run(measure)
