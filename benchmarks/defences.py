"""What hostile clients do to a round with each defence, and what a defence costs: ``python -m benchmarks.defences``.

Errors: 20 clients of ranks 2 to 4 that share a task (A = A₀ + 0.2·own, B alike) in two layers; ‖ΔW − honest mean‖_F
over ‖honest mean‖_F, for 0, 10 and 30 % of hostile ones. Cost: the wall time of ``aggregate`` over 100 clients in
memory, with and without the defence in turn, the fastest of each. ``--out FILE`` writes the tables to a file as well.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import flexlora_fast as ff
from flexlora_fast import defence
from tests.defences import ATTACKS, alike, attacked, error_of
from tests.rounds import Client, Layer

CLIENTS = 20
SHARES = (0.0, 0.1, 0.3)
LAYERS = (Layer("up", 192, 128), Layer("down", 128, 192))
# (layers, m = n, rank of each client, dtype)
COSTS = ((8, 1024, 8, torch.float32), (4, 2048, 16, torch.float32), (4, 2048, 16, torch.bfloat16))
PEOPLE = 100


def rules() -> dict[str, defence.Defence | None]:
    """All that stand by themselves, and FLTrust with an honest server's update."""
    found: dict[str, defence.Defence | None] = {"none": None}
    found |= {name: defence.get(name) for name in defence.RULES if name != "fltrust"}
    server = alike(CLIENTS + 1, LAYERS, spread=0.2)[-1]
    return found | {"fltrust": defence.FLTrust(reference=server.adapter())}


def errors(rule: defence.Defence | None) -> dict[str, list[float]]:
    """By attack, the error for each share of hostile clients; NaN where the round stops at bad values."""
    honest = alike(CLIENTS, LAYERS, spread=0.2)
    found = {}
    for attack in ATTACKS:
        found[attack] = []
        for share in SHARES:
            count = round(share * CLIENTS)
            found[attack].append(error(attacked(honest, attack, count), honest[count:], rule))
    return found


def error(clients: list[Client], honest: list[Client], rule: defence.Defence | None) -> float:
    try:
        weights = [c.weight for c in clients]
        return error_of(ff.aggregate([c.adapter() for c in clients], weights, rank=128, defence=rule), honest)
    except ff.errors.AdapterError:
        return float("nan")


def error_lines() -> Iterator[str]:
    yield f"| defence | {' | '.join(ATTACKS)} |"
    yield f"|---|{'---|' * len(ATTACKS)}"
    for name, rule in rules().items():
        cells = [" / ".join("stops" if math.isnan(x) else f"{x:.2f}" for x in row) for row in errors(rule).values()]
        yield f"| {name} | {' | '.join(cells)} |"


def cost_lines(repeats: int) -> Iterator[str]:
    yield "| layers | m = n | rank | dtype | solver | none, s | clip, s | overhead |"
    yield "|---|---|---|---|---|---|---|---|"
    for layers, side, rank, dtype in COSTS:
        adapters = people(layers, side, rank, dtype)
        plain = defended = math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            update = ff.aggregate(adapters, rank=16)
            plain, start = min(plain, time.perf_counter() - start), time.perf_counter()
            ff.aggregate(adapters, rank=16, defence="clip")
            defended = min(defended, time.perf_counter() - start)
        solver = ", ".join(update.solvers())
        kind = str(dtype).removeprefix("torch.")
        yield (
            f"| {layers} | {side} | {rank} | {kind} | {solver} | {plain:.2f} | {defended:.2f} "
            f"| {100 * (defended / plain - 1):.0f} % |"
        )


def people(layers: int, side: int, rank: int, dtype: torch.dtype) -> list[ff.Adapter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(PEOPLE):
        state = {}
        for layer in range(layers):
            for factor, shape in (("A", (rank, side)), ("B", (side, rank))):
                value = torch.randn(shape, generator=generator) / side**0.5
                state[f"base_model.model.l{layer}.lora_{factor}.weight"] = value.to(dtype)
        made.append(ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 2 * rank}, client=f"c{i:03d}"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the tables, beside printing them")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each round whose time is taken")
    options = parser.parse_args()
    warnings.simplefilter("error")
    shares = " / ".join(f"{100 * share:.0f} %" for share in SHARES)
    lines = [
        "# Defences",
        "",
        f"`python -m benchmarks.defences`, torch {torch.__version__}, {torch.get_num_threads()} thread(s) of "
        f"{os.cpu_count()}. What the figures are: `benchmarks/defences.py`.",
        "",
        f"## Error with {shares} hostile clients",
        "",
        *error_lines(),
        "",
        f"## Cost at {PEOPLE} clients",
        "",
        *cost_lines(options.repeats),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
