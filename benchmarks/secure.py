"""What secure aggregation costs in accuracy, bytes and time: ``python -m benchmarks.secure [--quick] [--out FILE]``.

Error: ‖ΔW − X‖_F over that of the best rank-R matrix, both in float64, the worst of three seeds; 20 clients of ranks 4
to 32, "decay" and "flat" as in ``benchmarks.workloads``, integers modulo 2³² with room for 100 clients, clip 1.01 times
the largest client's norm. Bytes: what a client sends for one layer in all summed rounds, against its factors at rank R
and against ΔW in float32, and what it receives for the server's bases. Time: one client's summed rounds for 128 layers
4096×4096 (a 7B model's attention) at rank 16 in bfloat16, in a process of its own, protocols in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexlora_fast as ff
from benchmarks.fresh import Fresh
from benchmarks.machine import cpu_name
from benchmarks.text import Check, markdown, mebibytes, seconds, target_table
from benchmarks.truth import Truth
from benchmarks.workloads import Workload
from flexlora_fast.secure import Plan, Server, add, matrices, sketch

PROTOCOLS: dict[str, dict[str, Any]] = {
    "one-round, k = R + 8": {"rounds": 1, "oversample": 8},
    "one-round, k = 2R + 1": {"rounds": 1},
    "one-round, k = 4R": {"rounds": 1, "oversample": None},  # see options()
    "two-round": {"rounds": 2},
    "two-round + ½ power step": {"rounds": 3},
    "two-round + 1 power step": {"rounds": 4},
    "two-round + 2 power steps": {"rounds": 6},
}
TARGET, BOUND = "two-round + 1 power step", 1.05
PEOPLE = tuple(4 + 28 * i // 19 for i in range(20))
SHAPES, RANKS, SEEDS = ((768, 768), (768, 3072)), (8, 16, 32), 3
BYTES = ((768, 768), (768, 3072), (4096, 4096))
CODES = {"64 bits": (64, 1.0), "32 bits": (32, 1.0), "32 bits, clip ×10": (32, 10.0), "32 bits, clip ×1000": (32, 1e3)}


def options(name: str, rank: int) -> dict[str, Any]:
    """Of a protocol's plan at rank R."""
    return PROTOCOLS[name] | ({"oversample": 3 * rank} if name.endswith("4R") else {})


def adapters(workload: Workload) -> list[ff.Adapter]:
    """The workload's clients, whose mean is its ΔW."""
    made = []
    for B, A, c in workload.clients():
        rank = A.shape[0]
        config = {"r": rank, "lora_alpha": c * rank * len(workload.ranks)}
        made.append(ff.Adapter.from_state_dict({"fc.lora_A.weight": A, "fc.lora_B.weight": B}, config))
    return made


def plan_of(clients: list[ff.Adapter], rank: int, clip: float = 1.0, **more: Any) -> Plan:
    """``clip``: in 1.01 × the largest client's norm."""
    largest = max(float(torch.linalg.matrix_norm(a.delta("fc"))) for a in clients)
    return Plan.from_adapter(clients[0], rank=rank, clients=100, clip=1.01 * clip * largest, **more)


def through(plan: Plan, clients: list[ff.Adapter]) -> tuple[Tensor, Tensor]:
    """B and A of the round's result."""
    server = Server(plan)
    while not server.done:
        server.receive(add(sketch(a, plan, server.message) for a in clients))
    A, B = server.finish()["fc"].factors(plan.rank, "B")
    return B[0], A[0]


def floating(plan: Plan, clients: list[ff.Adapter]) -> tuple[Tensor, Tensor]:
    """The same of ΔW itself in float64, two rounds or more: without clients, integers and float32 bases."""
    D = torch.stack([a.delta("fc").double() for a in clients]).mean(dim=0)
    W = matrices.right(plan, plan.layers[0])[0]
    for stage in range(1, plan.rounds):
        W = torch.linalg.qr((D if stage % 2 else D.mT) @ W)[0]
    K = (D if plan.rounds % 2 else D.mT) @ W
    U, S, Vh = torch.linalg.svd(K @ W.mT if plan.rounds % 2 else W @ K.mT, full_matrices=False)
    return U[:, : plan.rank] * S[: plan.rank], Vh[: plan.rank]


def ratio(truth: Truth, factors: tuple[Tensor, Tensor], rank: int) -> float:
    return 1 + truth.excess(*factors, rank)


def workloads(quick: bool) -> Iterator[Workload]:
    for m, n in ((96, 96), (96, 160)) if quick else SHAPES:
        for spectrum in ("decay", "flat"):
            yield Workload(f"{m}×{n} {spectrum}", m, n, PEOPLE[::5] if quick else PEOPLE, 0, spectrum)


def errors(quick: bool) -> tuple[list[str], list[list[str]], float]:
    """Header, a row for each protocol, and the largest ratio of the protocol with a target."""
    ranks = (4,) if quick else RANKS
    rows: dict[str, list[list[float]]] = {name: [] for name in PROTOCOLS}
    header = ["error / best"]
    for workload in workloads(quick):
        clients, truth = adapters(workload), Truth(workload.clients())
        header.append(f"{workload.name}, R = {' / '.join(map(str, ranks))}")
        for name, row in rows.items():
            plans = [plan_of(clients, rank, **options(name, rank)) for rank in ranks]
            row.append(
                [
                    max(ratio(truth, through(replace(p, seed=seed), clients), p.rank) for seed in range(SEEDS))
                    for p in plans
                ]
            )
    body = [[name, *(" / ".join(f"{x:.3f}" for x in cell) for cell in row)] for name, row in rows.items()]
    return header, body, max(x for cell in rows[TARGET] for x in cell)


def codes(quick: bool) -> tuple[list[str], list[list[str]]]:
    """The protocol with a target, by the code of its vectors; float is the algorithm without one."""
    rank = 4 if quick else 16
    found = list(workloads(quick))
    body: list[list[str]] = [["float64", *("" for _ in found)], *([name, *("" for _ in found)] for name in CODES)]
    for column, workload in enumerate(found, start=1):
        clients, truth = adapters(workload), Truth(workload.clients())
        plan = plan_of(clients, rank, **PROTOCOLS[TARGET])
        body[0][column] = f"{ratio(truth, floating(plan, clients), rank):.5f}"
        for row, (bits, clip) in zip(body[1:], CODES.values(), strict=True):
            coded = plan_of(clients, rank, clip, bits=bits, **PROTOCOLS[TARGET])
            row[column] = f"{ratio(truth, through(coded, clients), rank):.5f}"
    return ["", *(workload.name for workload in found)], body


def sizes(rank: int) -> tuple[list[str], list[list[str]]]:
    """Bytes of one layer of one client, by shape; with 64 bits what is sent doubles."""
    body = []
    for m, n in BYTES:
        state = {"fc.lora_A.weight": torch.zeros(rank, n), "fc.lora_B.weight": torch.zeros(m, rank)}
        adapter = ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": rank})
        plain, whole = 4 * rank * (m + n), 4 * m * n
        body.append([f"{m}×{n}", "plain LoRA upload, float32", "–", kilobytes(plain), "1", f"{plain / whole:.3f}", "–"])
        for name in PROTOCOLS:
            plan = Plan.from_adapter(adapter, rank=rank, clients=100, clip=1.0, **options(name, rank))
            sent = sum(plan.dtype.itemsize * part.size for stage in plan.stages for part in stage if part.name)
            back = sum(
                4 * torch.Size(plan.basis_shape(plan.layers[0], stage)).numel()
                for stage in range(2, len(plan.stages) + 1)
            )
            cells = [str(len(plan.stages)), kilobytes(sent), f"{sent / plain:.2f}", f"{sent / whole:.3f}"]
            body.append(["", name, *cells, kilobytes(back) if back else "–"])
    header = ["layer", f"R = {rank}", "summed rounds", "kB up", "× plain float32", "× dense float32", "kB down"]
    return header, body


def kilobytes(count: int) -> str:
    return f"{count / 1000:,.0f}"


def large(layers: int, side: int) -> ff.Adapter:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(layers):
        for factor, shape in (("A", (16, side)), ("B", (side, 16))):
            value = torch.randn(shape, generator=generator) / side**0.5
            state[f"l{layer}.lora_{factor}.weight"] = value.bfloat16()
    return ff.Adapter.from_state_dict(state, {"r": 16, "lora_alpha": 32})


def client_rounds(name: str, layers: int, side: int) -> Callable[[], list[float]]:
    """A call that takes a client through all rounds, and tells the seconds of each; the bases are made ahead."""
    torch.set_num_threads(1)
    adapter = large(layers, side)
    plan = Plan.from_adapter(adapter, rank=16, clients=100, clip=1e3, **options(name, 16))
    server, messages = Server(plan), []
    while not server.done:
        messages.append(server.message)
        server.receive(sketch(adapter, plan, messages[-1]))

    def call() -> list[float]:
        times = []
        for broadcast in messages:
            start = time.perf_counter()
            sketch(adapter, plan, broadcast)
            times.append(time.perf_counter() - start)
        return times

    return call


def times(layers: int, side: int, repeats: int) -> tuple[list[str], list[list[str]]]:
    spent: dict[str, list[list[float]]] = {name: [] for name in PROTOCOLS}
    memory: dict[str, int | None] = {}
    with Fresh() as process:
        for _ in range(repeats):
            for name, runs in spent.items():
                process.prepare(client_rounds, name, layers, side)
                outcome = process.run()
                runs.append(outcome.value)
                memory[name] = outcome.grown
    body = []
    for name, runs in spent.items():
        best = [min(column) for column in zip(*runs, strict=True)]
        each = f"{1e3 * statistics.mean(best) / layers:.2f} ms"
        body.append([name, seconds(sum(best)), each, mebibytes(memory[name])])
    return ["", "all rounds", "a layer and round", "memory beyond the adapter"], body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the tables, beside printing them")
    parser.add_argument("--quick", action="store_true", help="small layers: to see it run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each protocol whose time is taken")
    args = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    header, body, worst = errors(args.quick)
    layers, side = (2, 256) if args.quick else (128, 4096)
    name = f"{TARGET}: error / best"
    lines = [
        "# Secure aggregation",
        "",
        f"`python -m benchmarks.secure`, torch {torch.__version__}, 1 thread of {os.cpu_count()}, {cpu_name()}.",
        "What the figures are: `benchmarks/secure.py`.",
        "",
        "## Error",
        "",
        markdown(header, body),
        "",
        target_table([Check(name, f"≤ {BOUND}", f"{worst:.3f} (the worst of all above)", worst <= BOUND)]),
        "",
        f"## Fixed point ({TARGET})",
        "",
        markdown(*codes(args.quick)),
        "",
        "## Bytes of a client for one layer",
        "",
        markdown(*sizes(16)),
        "",
        f"## Time of a client: {layers} layers {side}×{side}, one thread",
        "",
        markdown(*times(layers, side, args.repeats)),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
