"""The peers on the GPU, and the authors' loop on whole rounds.

In torch alone they are the CPU suite's own functions, given factors on the GPU: one definition, run wholly there.
Run as a stage, it times the FlexLoRA authors' loop on one layer of each shape of round-7b, and multiplies by the count.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import costs, models
from benchmarks.gpu import ops, stage
from benchmarks.gpu.sizes import kept, one_of_each, rounds
from benchmarks.gpu.stage import Deadline, Options, Report, wall
from benchmarks.models import ModelRound
from benchmarks.peers import ESTIMATED, METHODS, OURS, Answer, dense_delta
from benchmarks.workloads import Clients, Workload

AUTHORS = "FlexLoRA authors' loop"
CUPY = "dense + cupy.linalg.svd"
# A layer of this size is what a method's first run is predicted from.
_PILOT = Workload("pilot", 768, 768, (16,) * 4, 16)
_TINY_PILOT = Workload("pilot", 64, 64, (4,) * 3, 4)


def cupy_svd(clients: Clients, k: int) -> Answer:
    """ΔW by torch, handed over without a copy, and CuPy's thin SVD of it."""
    import cupy

    U, S, Vh = cupy.linalg.svd(cupy.from_dlpack(dense_delta(clients)), full_matrices=False)
    return Answer(torch.from_dlpack(U[:, :k] * S[:k]), torch.from_dlpack(Vh[:k]))


# Each prepares (untimed) and returns the call to time; ours takes the clients in first, as the round does.
GPU_METHODS: dict[str, Callable[[Clients, int], Callable[[], Answer]]] = {
    OURS: ops.prepared_layer,
    ESTIMATED: functools.partial(ops.prepared_layer, certificate="estimate"),
    AUTHORS: METHODS[AUTHORS],
    "PEFT add_weighted_adapter": METHODS["PEFT add_weighted_adapter"],
    "dense + linalg.svd": METHODS["dense + linalg.svd"],
    CUPY: lambda clients, k: lambda: cupy_svd(clients, k),
    "dense + svd_lowrank": METHODS["dense + svd_lowrank"],
    "QR + QR + core SVD": METHODS["QR + QR + core SVD"],
    "two-stage sketch": METHODS["two-stage sketch"],
}
# Their time is a full SVD's, which is seconds: predicted before it is spent.
FULL_SVD = (AUTHORS, "PEFT add_weighted_adapter", "dense + linalg.svd", CUPY)


def obstacle(name: str, options: Options) -> str | None:
    """Why a method cannot run on this machine at all."""
    if name == CUPY and not options.cuda:
        return stage.NEEDS_GPU
    package = {CUPY: "cupy", "PEFT add_weighted_adapter": "peft"}.get(name)
    try:
        if package:
            __import__(package)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return None


def pilot_rate(name: str, options: Options) -> float:
    """Flop/s of a method with a full SVD at a size that takes a fraction of a second, by the count in costs.py.

    Larger layers run at a higher rate, so what is predicted from it is an upper bound.
    """
    pilot = _TINY_PILOT if options.quick else _PILOT
    call = GPU_METHODS[name](pilot.clients(options.device), pilot.k)
    wall(call, options.device)
    layer = costs.layer_of(pilot)
    return svd_flops(layer) / wall(call, options.device)


def svd_flops(layer: costs.Layer) -> float:
    return costs.full_svd_flops(layer.m, layer.n)


def time_loop(round_: ModelRound, options: Options, deadline: Deadline) -> dict[str, Any]:
    """The authors' loop on a layer of each shape, smallest first: seconds each, and times their number.

    A larger shape is left out where it would outlast the time, at the rate of those before it.
    """
    shapes = one_of_each(round_)
    only = {name for name, _ in shapes.values()}
    narrow = dataclasses.replace(round_, layers=tuple(layer for layer in round_.layers if layer[0] in only))
    states = list(models.drawn(narrow, options.device))
    configs = [models.config(round_, rank) for rank in round_.ranks]
    rows: dict[str, Any] = {}
    rate = float("inf")
    for (m, n), (name, count) in sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1]):
        flops = costs.full_svd_flops(m, n)
        if flops / rate > deadline.left:
            why = f"predicted {flops / rate:.0f} s, {deadline.left:.0f} s left"
            rows[f"{m}x{n}"] = {"not_run": why, "count": count}
            continue
        clients = [(B.float(), A.float(), c) for B, A, c in ops.client_factors(states, configs, round_.weights(), name)]
        seconds = wall(GPU_METHODS[AUTHORS](clients, kept(options.quick)), options.device)
        rows[f"{m}x{n}"] = {"seconds": seconds, "count": count}
        rate = flops / seconds
    complete = all("seconds" in row for row in rows.values())
    return {
        "how": "one layer of each shape timed once, times how many there are",
        "layers": rows,
        "total_seconds": sum(row["seconds"] * row["count"] for row in rows.values()) if complete else None,
    }


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.85 * options.seconds)
    report["pilot_flops_per_second"] = pilot_rate(AUTHORS, options)  # and its libraries are loaded
    for name, round_ in rounds(options.quick).items():
        with report.attempt(name):
            report[name] = time_loop(round_, options, deadline)
            print(f"{name}: {report[name]['total_seconds']} s for all layers", flush=True)


if __name__ == "__main__":
    stage.run(measure)
