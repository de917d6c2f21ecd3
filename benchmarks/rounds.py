"""Whole rounds through the public API, from files to a file, beside what reading and computing alone would take."""

from __future__ import annotations

import json
import os
import statistics
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import flexlora_fast as ff
from benchmarks import costs
from benchmarks.fresh import Fresh
from benchmarks.machine import Limits
from benchmarks.models import ModelRound

WEIGHTS = "adapter_model.safetensors"
# Threads of the plain reads; the better of the two is the floor.
_READERS = (1, 4)

Folders = Sequence[Path]


# -- in another process: prepared, then run ---


def prepare_round(
    folders: Folders, weights: Sequence[float], k: int, memory_limit: str, read: str, out: Path
) -> Callable[[], dict[str, Any]]:
    """A round: all clients added, finished to ``out``."""
    ff.Adapter.load(folders[0])  # imports
    torch.ones(256, 256) @ torch.ones(256, 256)

    def call() -> dict[str, Any]:
        start = time.perf_counter()
        aggregator = ff.Aggregator(rank=k, memory_limit=memory_limit, read=read, progress=False)
        for i, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
            last = time.perf_counter()
            aggregator.add(folder, weight, client=f"client-{i:05d}")
        update = aggregator.finish(out)
        end = time.perf_counter()
        layers = {name: (update[name].solver, update[name].factorization.iterations) for name in update.layers}
        return {"seconds": end - start, "last_client_seconds": end - last, "layers": layers}

    return call


def prepare_in_memory(folders: Folders, weights: Sequence[float], k: int, layer: str) -> Callable[[], float]:
    """One layer of the round whose factors are already in memory, and whose result stays there; median seconds of 3.

    ``read="finish"``: the round from files does nothing before ``finish`` either, so none of the Grams are grown
    beforehand.
    """
    aggregator = ff.Aggregator(rank=k, read="finish", progress=False)
    for i, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = [key for key in file.keys() if f".{layer}.lora_" in key]  # noqa: SIM118 - not a dict
            tensors = {key: file.get_tensor(key).clone() for key in keys}
        aggregator.add(ff.Adapter.from_state_dict(tensors, config), weight, client=f"client-{i:05d}")

    def call() -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            aggregator.finish()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return call


def prepare_reads(folders: Folders, threads: int) -> Callable[[], int]:
    """Plain positioned reads of every tensor, layer by layer as a round needs them; returns the bytes read."""
    files = [(os.open(folder / WEIGHTS, os.O_RDONLY), tensor_ranges(folder / WEIGHTS)) for folder in folders]
    order = [(file, *ranges[i]) for i in range(len(files[0][1])) for file, ranges in files]

    def read(part: list[tuple[int, int, int]]) -> int:
        buffer = memoryview(bytearray(max(length for _, _, length in part)))
        return sum(os.preadv(file, [buffer[:length]], offset) for file, offset, length in part)

    def call() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read, [order[i::threads] for i in range(threads)]))

    return call


def tensor_ranges(file: Path) -> list[tuple[int, int]]:
    """(offset, length) in bytes of every tensor of a safetensors file, by name."""
    with file.open("rb") as source:
        size = struct.unpack("<Q", source.read(8))[0]
        header = json.loads(source.read(size))
    header.pop("__metadata__", None)
    spans = [header[name]["data_offsets"] for name in sorted(header)]
    return [(8 + size + start, end - start) for start, end in spans]


# -- here ---


def drop_pages(folders: Folders) -> None:
    """Take the files out of the page cache, so that the next reading comes from the disk."""
    for folder in folders:
        file = os.open(folder / WEIGHTS, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_floor(folders: Folders, cold: bool) -> float:
    """Seconds of the fastest plain reading of the same tensors in the same state of the page cache."""
    seconds = []
    for threads in _READERS:
        with Fresh() as process:
            process.prepare(prepare_reads, folders, threads)
            if cold:
                drop_pages(folders)
            else:
                process.run()  # whatever was not in memory now is
                process.prepare(prepare_reads, folders, threads)
            seconds.append(process.run().seconds)
    return min(seconds)


def compute_floor(round_: ModelRound, layers: dict[str, tuple[str, int]], limits: Limits) -> float | None:
    """Seconds of the chosen algorithms' flops at the measured matrix rate; None where one has no formula."""
    shapes = {name: (m, n) for name, m, n in round_.layers}
    total = 0.0
    for name, (solver, steps) in layers.items():
        work = costs.solver_work(costs.Layer(*shapes[name], round_.R, round_.k, len(round_.ranks)), solver, steps)
        if work is None:
            return None
        total += work[0] / limits.matrix_float32
    return total


def in_memory(round_: ModelRound, folders: Folders) -> float:
    """Seconds for all layers by the in-memory path: one layer of each shape timed, times how many there are."""
    counts = Counter((m, n) for _, m, n in round_.layers)
    one = {(m, n): name for name, m, n in round_.layers}
    total = 0.0
    with Fresh() as process:
        for shape, count in counts.items():
            process.prepare(prepare_in_memory, folders, round_.weights(), round_.k, one[shape])
            total += count * process.run().value
    return total


def run_state(
    round_: ModelRound, folders: Folders, cold: bool, limits: Limits, memory_limit: str, out: Path, benchmark: Any
) -> dict[str, Any]:
    """One round with the files in memory or not (``cold``), and its floors.

    The floor of reading comes first. Out of this machine's page cache, files may still be in that of a host or a disk
    below, which the first to read them pays for: 2 GB took 13 s once and 2 s from then on.
    """
    floor = read_floor(folders, cold)
    with Fresh() as process:
        process.prepare(prepare_round, folders, round_.weights(), round_.k, memory_limit, "finish", out)
        if cold:
            drop_pages(folders)
        run = process.run if benchmark is None else lambda: benchmark.pedantic(process.run, rounds=1)
        outcome = run()
    out.unlink()
    found = outcome.value
    layers = found.pop("layers")
    return found | {
        "peak_bytes": outcome.peak,
        "read_floor": floor,
        "compute_floor": compute_floor(round_, layers, limits),
        "solvers": Counter(solver for solver, _ in layers.values()),
    }


def measure(benchmark: Any, round_: ModelRound, folders: Folders, limits: Limits, memory_limit: str) -> None:
    """A round cold and warm, against its floors and the in-memory path; left in ``benchmark.extra_info``."""
    out = folders[0].parent / "update.safetensors"
    cold = run_state(round_, folders, True, limits, memory_limit, out, benchmark)
    warm = run_state(round_, folders, False, limits, memory_limit, out, None)
    benchmark.extra_info.update(
        kind="round",
        workload=round_.name,
        layers=len(round_.layers),
        clients=len(round_.ranks),
        R=round_.R,
        k=round_.k,
        bytes=round_.bytes,
        memory_limit=memory_limit,
        states={"cold": cold, "warm": warm},
        in_memory_seconds=in_memory(round_, folders),
    )


def scale(round_: ModelRound, folders: Folders, clients: int, memory_limit: str) -> dict[str, Any]:
    """A round of the first ``clients``, read as they come (``read="add"``): seconds and peak memory."""
    out = folders[0].parent / "update.safetensors"
    with Fresh() as process:
        process.prepare(prepare_round, folders[:clients], round_.weights(clients), round_.k, memory_limit, "add", out)
        outcome = process.run()
    out.unlink()
    found = outcome.value
    solver, _ = next(iter(found.pop("layers").values()))
    return found | {"peak_bytes": outcome.peak, "grown_bytes": outcome.grown, "solver": solver}
