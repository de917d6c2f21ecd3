"""Us against what a user could run instead, one layer at a time: ``python -m benchmarks.compare [--quick]``.

Every method answers the same question (the best rank-k factors of Σ w·s·B·A) on the same factors in the same run, in
alternation, so that a noisy neighbour hits all of them. Printed per method: median seconds, the ratio to ours, and the
excess ‖ΔW−X‖_F/‖ΔW−ΔW_k‖_F − 1 against the best rank-k approximation in float64. Ours includes stacking, planning and
the certificate, which no peer computes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.peers import PEERS, Clients
from benchmarks.synthetic import Round, Truth, paper_ranks, stack_of
from flexlora_fast.lowrank.solve import solve

OURS = "flexlora_fast (auto)"
CROSS_SILO = (4, 4, 8, 8, 16, 16, 32, 32, 64, 64)
ROUNDS = [
    Round("cross-silo: 10 clients, r 4…64", 4096, 4096, CROSS_SILO, 64),
    Round("cross-silo, flat spectrum", 4096, 4096, CROSS_SILO, 64, "flat"),
    Round("100 clients of r 16, k 16", 4096, 4096, (16,) * 100, 16),
    Round("100 clients of r 16, k 64", 4096, 4096, (16,) * 100, 64),
    Round("paper: 80 clients, r 8/30/200", 2048, 2048, paper_ranks(), 200),
    Round("paper, flat spectrum", 2048, 2048, paper_ranks(), 200, "flat"),
    Round("small model: 8 clients, r 2…32", 1536, 384, (2, 2, 4, 4, 8, 8, 16, 32), 32),
]
# PROPACK needs minutes where hundreds of triplets of a wide stack are wanted.
_SLOW = {("PROPACK on the factors", 200)}
# Seconds; OpenMP's default is to spin for 0.2.
_SETTLE = 0.4


def ours(clients: Clients, k: int) -> tuple[Tensor, Tensor]:
    """B', A' with all of S in B', through the planner."""
    f = solve(stack_of(clients), k)
    return f.U[0] * f.S[0].float(), f.V[0].T


def time_alternating(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each method, all run once per repeat, in turn, after one warm-up each.

    Before each, the thread pools of the one before come to rest: workers of OpenBLAS and OpenMP spin on for a while,
    which tripled the time of whatever followed PROPACK.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, call in methods.items():
            time.sleep(_SETTLE)
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def compare(round_: Round, repeats: int) -> dict[str, object]:
    """One round's row for every method: seconds, ratio to ours, excess."""
    clients = round_.factors()
    methods = {OURS: ours} | {name: peer for name, peer in PEERS.items() if (name, round_.k) not in _SLOW}
    truth = Truth(clients)
    excess = {}
    for name, method in methods.items():
        B, A = method(clients, round_.k)
        excess[name] = truth.excess(B @ A, round_.k)
    calls = {name: (lambda m=method: m(clients, round_.k)) for name, method in methods.items()}
    seconds = time_alternating(calls, repeats)
    rows = {
        name: {"seconds": seconds[name], "ratio": seconds[name] / seconds[OURS], "excess": excess[name]}
        for name in methods
    }
    shape = {"m": round_.m, "n": round_.n, "R": sum(round_.ranks), "k": round_.k, "spectrum": round_.spectrum}
    solver = solve(stack_of(clients), round_.k).solver
    return {"round": round_.name, **shape, "clients": len(round_.ranks), "solver": solver, "methods": rows}


def show(result: dict, console: Console) -> None:
    table = Table(title=f"{result['round']} · {result['m']}×{result['n']}, R {result['R']}, k {result['k']}")
    table.add_column("method")
    for column in ("seconds", "× ours", "excess"):
        table.add_column(column, justify="right")
    for name, row in result["methods"].items():
        label = f"{name} → {result['solver']}" if name == OURS else name
        table.add_row(label, f"{row['seconds']:.4f}", f"{row['ratio']:.1f}", f"{row['excess']:.1e}")
    console.print(table)


def commit() -> str:
    """The commit that was measured, marked where the tree differs from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the small model's round")
    parser.add_argument("--only", default="", help="only rounds whose name holds this")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    console = Console()
    results = []
    for round_ in ROUNDS[-1:] if args.quick else ROUNDS:
        if args.only in round_.name:
            results.append(compare(round_, args.repeats))
            show(results[-1], console)
    if args.out:
        machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        about = {"commit": commit(), "machine": machine, "torch": torch.__version__, "repeats": args.repeats}
        args.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
