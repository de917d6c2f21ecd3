"""round-7b on the GPU: all layers of Llama-2-7B of 100 clients, their bfloat16 factors resident, to k = 64.

Total time, its parts, the excess of a sample of layers in float64, how much of it small problems take, peak memory, and
whether two runs agree bit for bit.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flexlora_fast as ff
from benchmarks import models
from benchmarks.gpu import ops, stage
from benchmarks.gpu.sizes import kept, one_of_each, rounds
from benchmarks.gpu.stage import NEEDS_GPU, OVERSAMPLING, Options, Report, wall
from benchmarks.models import ModelRound
from benchmarks.truth import Truth

# Passes over the factors that the floor counts: a randomized range finder with two power iterations.
PASSES = 6
_REPEATS = 7

Finish = Callable[[], ff.GlobalUpdate]


def floor_seconds(round_: ModelRound, k: int, ceilings: dict[str, Any]) -> float | None:
    """The least time of a range finder on the factors with float32's accuracy, on this device's measured ceilings.

    Each of ``PASSES`` passes reads every factor once and multiplies it with k + 10 columns in three bfloat16 products:
    the slower of the two. Launches and small problems are not in it.
    """
    if "copy" not in ceilings or "bf16" not in ceilings:
        return None
    flops = 2.0 * round_.R * (k + OVERSAMPLING) * sum(m + n for _, m, n in round_.layers)
    return PASSES * max(round_.bytes / ceilings["copy"], 3 * flops / ceilings["bf16"])


def identical(one: ff.GlobalUpdate, two: ff.GlobalUpdate) -> bool:
    """Whether all triplets are the same, bit for bit."""
    return one.layers == two.layers and all(
        torch.equal(x, y)
        for layer in one.layers
        for x, y in zip(ops.triplets(one, layer), ops.triplets(two, layer), strict=True)
    )


def excess(update: ff.GlobalUpdate, round_: ModelRound, states: list[dict[str, Tensor]], k: int) -> dict[str, float]:
    """By layer, of one layer of each shape."""
    configs = [models.config(round_, rank) for rank in round_.ranks]
    found = {}
    for name, _ in one_of_each(round_).values():
        truth = Truth(ops.client_factors(states, configs, round_.weights(), name))
        B, A, *_ = ops.answer(update, name)
        found[name] = truth.excess(B, A, k)
        del truth
    return found


def small_share(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Of one run: device time in the small problems, and its share of the run's wall time."""
    watcher = ops.SmallProblems()
    with watcher.watch():
        seconds = wall(call, device)
    if not watcher.spans:
        names = ", ".join(name for _, name in ops.SMALL)
        return {"share": None, "why": f"no call of {names} was seen: the engine's small problems are elsewhere"}
    found = {"share": watcher.seconds / seconds, "seconds": watcher.seconds, "calls": len(watcher.spans)}
    return found | {"absent": watcher.absent}


def kernel_times(call: Callable[[], object], most: int = 12) -> dict[str, Any]:
    """Device time of one run by torch's profiler: in all, and of the kernels that take the most."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "device_seconds": sum(e.self_device_time_total for e in events) / 1e6,
        "kernels": [
            {"kernel": e.key[:120], "seconds": e.self_device_time_total / 1e6, "calls": e.count} for e in events[:most]
        ],
    }


def timed(call: Finish, options: Options, row: dict[str, Any]) -> ff.GlobalUpdate:
    """The first run, which compiles and allocates; the second, held against it bit for bit; and the median of more."""
    updates: list[ff.GlobalUpdate] = []
    row["first_seconds"] = wall(lambda: updates.append(call()), options.device)
    row["all_seconds"] = [wall(lambda: updates.append(call()), options.device)]
    row["identical"] = identical(*updates)
    repeats = 1 if options.quick else max(1, min(_REPEATS, int(0.1 * options.seconds / row["all_seconds"][0])))
    row["all_seconds"] += [wall(call, options.device) for _ in range(repeats)]
    row["seconds"] = statistics.median(row["all_seconds"])
    return updates[-1]


def watched(call: Finish, device: str, row: dict[str, Any]) -> None:
    """What only a GPU tells, each from a run of its own: peak memory beside the factors, small problems, kernels."""
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    call()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - resident
    row["small"] = small_share(call, device)
    row |= kernel_times(call)


def measure_round(round_: ModelRound, options: Options, report: Report, name: str) -> None:
    """Fill ``report[name]``, written after every part."""
    k = kept(options.quick)
    row: dict[str, Any] = {"layers": len(round_.layers), "clients": len(round_.ranks), "R": round_.R, "k": k}
    row |= {"bytes": round_.bytes, "floor_seconds": floor_seconds(round_, k, options.found("ceilings"))}
    report[name] = row
    states = list(models.drawn(round_, options.device))
    configs = [models.config(round_, rank) for rank in round_.ranks]
    start = time.perf_counter()
    call = ops.prepared_round(states, configs, round_.weights(), k, options.device)
    row["take_in_seconds"] = time.perf_counter() - start
    update = timed(call, options, row)
    row |= {"phases": dict(ops.phases(update)), "solvers": Counter(update[x].solver for x in update.layers)}
    report.write()
    row["excess"] = excess(update, round_, states, k)
    report.write()
    if options.cuda:
        watched(call, options.device, row)
    else:
        row |= {"peak_bytes": None, "small": {"share": None, "why": NEEDS_GPU}, "device_seconds": None}
    report.write()


def measure(options: Options, report: Report) -> None:
    for name, round_ in rounds(options.quick).items():
        with report.attempt(name):
            measure_round(round_, options, report, name)
            print(f"{name}: {report[name]['seconds']:.4g} s", flush=True)
        gc.collect()
        if options.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    stage.run(measure)
