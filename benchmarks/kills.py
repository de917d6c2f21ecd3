"""What a journalled round survives, and what its journal costs: ``python -m benchmarks.kills [--out FILE]``.

Kills: a round of nine ops (uploads taken, refused, replaced, repeated and dropped, then the end) is killed, loses
power or finds its disk full before each call that changes its folder and in the middle of each write; the folder is
taken up, clients that heard nothing send again, and the update must be the same, byte for byte (``tests/kills.py``).

Cost: uploads a second into a ``Round``, and into an ``Aggregator`` under the same policy that keeps its copies in the
same folder, in turn, the median of five; and the time to take the round up again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save

import flexlora_fast as ff
from tests import kills, rounds

# (layers, m = n, rank, uploads)
SIZES = ((8, 256, 8, 100), (64, 1024, 16, 20))
FOLDERS = {"disk": None, "memory": "/dev/shm"}


def survived() -> list[str]:
    rows = ["| at each call | points | same bytes | calls of the undisturbed round |", "| --- | --- | --- | --- |"]
    for what in kills.RUNS:
        command = [sys.executable, "-m", "tests.kills", what]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        result = json.loads(done.stdout)  # it stops at the first point that gives other bytes
        rows.append(f"| {what} | {result['points']} | {result['points']} | {result['trace']} |")
    return rows


def cost() -> list[str]:
    rows = [
        "| upload | where | in the journal | in memory and copied alone | ratio | taken up again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count, side, rank, uploads in SIZES:
        layers = [rounds.Layer(f"l{i}", side, side) for i in range(count)]
        of = ff.RoundPolicy.from_adapter(rounds.client("ref", layers, rank=rank).adapter(), ranks=(rank,))
        state = rounds.client("a", layers, rank=rank).state_dict()
        content = save({key: tensor.contiguous() for key, tensor in state.items()})
        for where, folder in FOLDERS.items():
            times: dict[str, list[float]] = {"journal": [], "plain": [], "again": []}
            for _ in range(5):
                base = Path(tempfile.mkdtemp(dir=folder))
                times["journal"].append(_journalled(base, of, content, uploads))
                times["again"].append(_again(base, content))
                times["plain"].append(_plain(base, of, content, uploads))
                shutil.rmtree(base)
            journal, plain, again = (statistics.median(times[key]) for key in ("journal", "plain", "again"))
            rows.append(
                f"| {len(content) / 1e6:.1f} MB | {where} | {uploads / journal:.0f}/s | {uploads / plain:.0f}/s | "
                f"{journal / plain:.2f}× | {again:.2f} s for {uploads} |"
            )
    return rows


def _journalled(base: Path, of: ff.RoundPolicy, content: bytes, uploads: int) -> float:
    with ff.Round.open(base / "r", policy=of, read="finish") as round_:
        start = time.perf_counter()
        for i in range(uploads):
            round_.add(content, client=f"c{i}")
        return time.perf_counter() - start


def _again(base: Path, content: bytes) -> float:
    """Until it can take the next upload."""
    start = time.perf_counter()
    with ff.Round.open(base / "r", read="finish") as round_:
        round_.add(content, client="c0")
        return time.perf_counter() - start


def _plain(base: Path, of: ff.RoundPolicy, content: bytes, uploads: int) -> float:
    (base / "plain").mkdir()
    agg = ff.Aggregator(policy=of, spool=base / "plain", read="finish")
    start = time.perf_counter()
    for i in range(uploads):
        agg.add(content, client=f"c{i}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    setting = f"`python -m benchmarks.kills`, torch {torch.__version__}, 1 thread of {os.cpu_count()}."
    text = "\n".join(["# Journalled rounds", "", f"{setting} What the figures are: `benchmarks/kills.py`.", ""])
    text += "\n".join(["## Survived", "", *survived(), "", "## Cost", "", *cost(), ""])
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
