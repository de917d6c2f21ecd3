"""Rounds from files on one, two and four ranks: ``python -m benchmarks.scaling``, which writes
``benchmarks/results/scaling.md``.

Each rank is a process of its own with one thread, bound to a core; ranks talk through gloo on this machine. Wall time
is from the moment when all ranks are there, with their imports done, to the update in the first rank's memory (or in
its file). One and two ranks run in turn, and the fastest of each counts. CPU time is that of the busiest rank, its
threads for gloo included: neighbours on the machine lengthen it far less than wall time. Its ratio says how evenly work
is shared out; what ranks wait for each other is in wall time alone. Four ranks share the cores of two: they show that
the update is the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flexlora_fast as ff
from benchmarks import machine, models
from benchmarks.models import ModelRound
from flexlora_fast import distributed

# Ranks are forked from a server that has imported everything.
multiprocessing.set_forkserver_preload(["flexlora_fast.distributed", "benchmarks.models", "benchmarks.machine"])

REPEATS = 5
MODEL = ModelRound("scaling-model", models.decoder(8, 2048, 256, 5632), (2, 4, 8, 8, 16, 16, 32, 64) * 2)
LAYER = ModelRound("scaling-layer", (("layer", 4096, 4096),), (8,) * 400)
# (what, round, options)
ROUNDS: tuple[tuple[str, ModelRound, dict[str, Any]], ...] = (
    ("layers shared out", MODEL, {"shard": "layers"}),
    ("layers shared out, to a file", MODEL, {"shard": "layers", "out": "update.safetensors"}),
    ("clients shared out, ΔW summed up", LAYER, {"shard": "clients", "solver": "dense"}),
    ("clients shared out, on the factors", LAYER, {"shard": "clients", "solver": "factored"}),
    (
        "the same, ‖ΔW‖ estimated",
        LAYER,
        {"shard": "clients", "solver": "factored", "certificate": "estimate"},
    ),
)


@dataclass(frozen=True)
class Run:
    """One round: wall seconds, and CPU seconds by rank; ``load``: runnable processes on the machine beside its ranks,
    as the load average has it.
    """

    wall: float
    cpu: list[float]
    load: float

    @property
    def busiest(self) -> float:
        return max(self.cpu)


def run(world: int, folders: Sequence[Path], k: int, options: dict[str, Any], keep: Path | None = None) -> Run:
    """The round on so many ranks; the update is saved in ``keep``."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as here:
        if "out" in options:
            options = options | {"out": Path(here) / options["out"]}
        arguments = (world, here, list(folders), k, options, keep)
        mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
        found = [json.loads((Path(here) / f"seconds-{rank}").read_text()) for rank in range(world)]
    return Run(found[0][0], [cpu for _, cpu in found], load)


def _rank(
    rank: int, world: int, here: str, folders: list[Path], k: int, options: dict[str, Any], keep: Path | None
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    store = dist.FileStore(f"{here}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.ones(512, 512) @ torch.ones(512, 512)
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    update = distributed.aggregate(folders, None, k, progress=False, **options)
    seconds = time.perf_counter() - start, time.process_time() - busy
    (Path(here) / f"seconds-{rank}").write_text(json.dumps(seconds))
    if keep is not None and update is not None:
        update.save(keep)
    dist.destroy_process_group()


def compared(one: ff.GlobalUpdate, other: ff.GlobalUpdate) -> str:
    """Whether two updates are the same, bit for bit, or how far apart their ΔW are as a share of ‖ΔW‖."""
    parts = ("U", "S", "V", "energy")
    pairs = [(one[layer].factorization, other[layer].factorization) for layer in one]
    if all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in pairs for part in parts):
        return "bit for bit"
    worst = 0.0
    for layer, (a, b) in zip(one, pairs, strict=True):
        # ‖UΣVᵀ − U'Σ'V'ᵀ‖_F² from k×k products, in float64.
        U, V = (torch.cat([getattr(x, part) for x in (a, b)], dim=2).double() for part in "UV")
        d = torch.cat([a.S, -b.S], dim=1)
        square = ((U.mT @ U) * (V.mT @ V) * d.unsqueeze(1) * d.unsqueeze(2)).sum()
        worst = max(worst, float(square.clamp_min(0)) ** 0.5 / one[layer].norm)
    return f"to {worst:.0e} of ‖ΔW‖"


def row(what: str, round_: ModelRound, options: dict[str, Any], root: Path, repeats: int) -> tuple[str, list[Run]]:
    folders = models.write(round_, root)
    with tempfile.TemporaryDirectory() as here:
        kept = {world: Path(here) / f"{world}.safetensors" for world in (1, 2, 4)}
        for world, path in kept.items():  # also brings the files into memory
            run(world, folders, round_.k, options, path)
        updates = {world: ff.GlobalUpdate.load(path) for world, path in kept.items()}
        same = {world: compared(updates[1], updates[world]) for world in (2, 4)}
    runs = [[run(world, folders, round_.k, options) for world in (1, 2)] for _ in range(repeats)]
    one, two = zip(*runs, strict=True)
    wall = [min(x.wall for x in column) for column in (one, two)]
    cpu = [min(x.busiest for x in column) for column in (one, two)]
    total = [min(sum(x.cpu) for x in column) for column in (one, two)]
    size = f"{len(round_.layers)} layer{'s' * (len(round_.layers) > 1)}, {len(folders)} clients"
    equal = same[2] if same[2] == same[4] else f"2: {same[2]}, 4: {same[4]}"
    text = (
        f"| {what}: {size}, {round_.bytes / 1e9:.2g} GB | {wall[0]:.2f} s | {wall[1]:.2f} s | {wall[0] / wall[1]:.2f} "
        f"| {cpu[0]:.2f} s | {cpu[1]:.2f} s | {cpu[0] / cpu[1]:.2f} | {total[1] / total[0] - 1:+.0%} | {equal} |"
    )
    return text, [x for pair in runs for x in pair]


def page(root: Path, repeats: int) -> str:
    lines, runs = [], list[Run]()
    for what, round_, options in ROUNDS:
        text, more = row(what, round_, options, root, repeats)
        runs += more
        lines.append(text)
        print(text, flush=True)
    cores = len(os.sched_getaffinity(0))
    loads = sorted(x.load for x in runs)
    # A round's own ranks keep up to two cores busy: what is above that is somebody else's.
    busy = f"{loads[0]:.1f} to {loads[-1]:.1f}, median {loads[len(loads) // 2]:.1f}"
    judged = (
        "the machine was busy with other work: take the ratios of CPU time, and wall times as upper bounds"
        if loads[len(loads) // 2] > cores + 0.5
        else "little else ran"
    )
    return (
        f"# Scaling over ranks\n\n`python -m benchmarks.scaling`, commit {machine.commit()}, torch "
        f"{torch.__version__}, {machine.cpu_name()}, one thread a rank, each on a core of its own of {cores}; gloo on "
        f"one machine; best of {repeats}, one and two ranks in turn. Load average before each run: {busy} on {cores} "
        f"cores, so {judged}. What the figures are: `benchmarks/scaling.py`.\n\n"
        "| round | wall, one rank | two ranks | times faster | CPU of the busiest, one rank | two ranks | times less "
        "| CPU of both together | update with 2 and 4 ranks, against one |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".bench-data"), help="where the clients' files are kept")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.md"))
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for each rank")
    options.out.write_text(page(options.data, options.repeats), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
