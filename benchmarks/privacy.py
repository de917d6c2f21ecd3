"""What a private round costs beside a plain one: ``python -m benchmarks.privacy``.

Wall time of rounds over clients in memory: plain, private with the noised matrix formed (``solver="dense"``), and with
it made again by tiles at each product (``"factored"``), in turn, the fastest of each; and how fast noise is made.
``--out FILE`` writes the tables to a file as well.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import flexlora_fast as ff
from flexlora_fast.privacy.noise import Noise, fresh_key
from tests import private
from tests.rounds import Client, Layer

# (layers, m = n, clients, rank of each, columns kept, ways)
PLAIN, DENSE, TILES = "plain", "dense", "factored"
COSTS = (
    (8, 1024, 16, 16, 16, (PLAIN, DENSE, TILES)),
    (8, 1024, 100, 16, 64, (PLAIN, DENSE, TILES)),
    (8, 4096, 16, 16, 16, (PLAIN, DENSE)),
    (1, 4096, 16, 16, 16, (PLAIN, DENSE, TILES)),
    (1, 4096, 100, 16, 64, (PLAIN, DENSE, TILES)),
)
SLOW = 20.0  # seconds beyond which a way is run once


def cost_lines(repeats: int) -> Iterator[str]:
    yield "| layers | m = n | clients × rank | k | plain, s | solver | private, formed, s | private, by tiles, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for layers, side, count, rank, k, ways in COSTS:
        shape = [Layer(f"l{i}", side, side) for i in range(layers)]
        people = [private.member(f"c{i:03d}", shape, rank) for i in range(count)]
        policy = private.policy(model=shape)
        best, solver = dict.fromkeys((PLAIN, DENSE, TILES), math.inf), ""
        for turn in range(repeats):
            for way in ways:
                if turn and best[way] > SLOW:
                    continue
                seconds, update = run(people, policy, way, k)
                best[way] = min(best[way], seconds)
                solver = ", ".join(update.solvers()) if way == PLAIN else solver
        cells = ["–" if math.isinf(best[way]) else f"{best[way]:.2f}" for way in (DENSE, TILES)]
        yield f"| {layers} | {side} | {count} × {rank} | {k} | {best[PLAIN]:.2f} | {solver} | {' | '.join(cells)} |"


def run(people: Sequence[Client], policy: ff.RoundPolicy, way: str, k: int) -> tuple[float, ff.GlobalUpdate]:
    adapters = [c.adapter() for c in people]
    privacy = None if way == PLAIN else private.privacy(denominator=float(len(people)))
    if privacy is not None:
        privacy.epsilon()  # the accountant's own seconds are told apart
    start = time.perf_counter()
    solver = "auto" if way == PLAIN else way
    update = ff.aggregate(adapters, rank=k, solver=solver, policy=policy, privacy=privacy)
    return time.perf_counter() - start, update


def noise_lines() -> Iterator[str]:
    count, best = 1 << 22, math.inf
    for _ in range(5):
        start = time.perf_counter()
        Noise(fresh_key(), "x").normal(0, count)
        best = min(best, time.perf_counter() - start)
    yield f"Noise: {count / best / 1e6:.0f} million entries a second ({8 * count / best / 1e9:.2f} GB/s of float64)."
    start = time.perf_counter()
    ff.privacy.epsilon([ff.privacy.Charge(1.0, 0.01)] * 1000, 1e-6)
    yield f"Accounting of 1,000 sampled rounds, the library's import among it: {time.perf_counter() - start:.1f} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the tables, beside printing them")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each round whose time is taken")
    options = parser.parse_args()
    lines = [
        "# Private rounds",
        "",
        f"`python -m benchmarks.privacy`, torch {torch.__version__}, {torch.get_num_threads()} thread(s) of "
        f"{os.cpu_count()}. What the figures are: `benchmarks/privacy.py`.",
        "",
        *noise_lines(),
        "",
        *cost_lines(options.repeats),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
