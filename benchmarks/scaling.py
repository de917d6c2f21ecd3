"""Rounds from files on one and on two ranks, one thread and one core each: ``python -m benchmarks.scaling``.

Each rank is a process of its own, bound to a core; ranks talk through gloo on this machine. Wall time from the moment
when all ranks are there, with their imports done, to the update in the first rank's memory (or in its file). One and
two ranks run in turn, and the fastest of each counts; the ratio of two is what the second core gives. ``--out FILE``
writes the table to a file as well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import models
from benchmarks.models import ModelRound
from flexlora_fast import distributed

REPEATS = 3
RANKS = (1, 2)
MODEL = ModelRound("scaling-model", models.decoder(8, 2048, 256, 5632), (2, 4, 8, 8, 16, 16, 32, 64) * 2)
LAYER = ModelRound("scaling-layer", (("layer", 4096, 4096),), (8,) * 400)
# (what, round, options)
ROUNDS: tuple[tuple[str, ModelRound, dict[str, Any]], ...] = (
    ("layers shared out", MODEL, {"shard": "layers"}),
    ("layers shared out, to a file", MODEL, {"shard": "layers", "out": "update.safetensors"}),
    ("clients shared out, ΔW summed up", LAYER, {"shard": "clients", "solver": "dense"}),
)


def run(world: int, folders: Sequence[Path], k: int, options: dict[str, Any]) -> float:
    """Wall seconds of the round on so many ranks."""
    with tempfile.TemporaryDirectory() as here:
        if "out" in options:
            options = options | {"out": Path(here) / options["out"]}
        mp.spawn(_rank, (world, here, list(folders), k, options), nprocs=world)
        return float((Path(here) / "seconds").read_text())


def _rank(rank: int, world: int, here: str, folders: list[Path], k: int, options: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    store = dist.FileStore(f"{here}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.ones(512, 512) @ torch.ones(512, 512)
    dist.barrier()
    start = time.perf_counter()
    distributed.aggregate(folders, None, k, progress=False, **options)
    if rank == 0:
        (Path(here) / "seconds").write_text(str(time.perf_counter() - start))
    dist.destroy_process_group()


def table(root: Path, repeats: int) -> str:
    lines = ["| round | one rank | two ranks | times faster |", "|---|---|---|---|"]
    for what, round_, options in ROUNDS:
        folders = models.write(round_, root)
        times = [[run(world, folders, round_.k, options) for world in RANKS] for _ in range(repeats)]
        one, two = (min(column) for column in zip(*times, strict=True))
        size = f"{len(round_.layers)} layers, {len(folders)} clients, {round_.bytes / 1e9:.2g} GB"
        lines.append(f"| {what}: {size} | {one:.2f} s | {two:.2f} s | {one / two:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".bench-data"), help="where the clients' files are kept")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < max(RANKS):
        raise SystemExit(f"{max(RANKS)} cores are needed, one for each rank")
    before = os.getloadavg()[0]
    rows = table(options.data, options.repeats)
    text = (
        f"# Scaling over ranks\n\n`python -m benchmarks.scaling`, torch {torch.__version__}, one thread a rank, each "
        f"on a core of its own of {os.cpu_count()}; gloo on one machine; best of {options.repeats}, in turn. What the "
        f"figures are: `benchmarks/scaling.py`. Load average before: {before:.1f}.\n\n"
        f"{rows}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
