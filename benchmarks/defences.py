"""What hostile clients do to a round with each defence, and what a defence costs: ``python -m benchmarks.defences``.

Errors: 20 clients of ranks 2 to 4 that share a task (A = A₀ + spread·own, B alike) in two layers. The target is the
task's own update, which no mean of 20 clients hits; ‖ΔW − target‖_F/‖target‖_F for 0, 10 and 30 % of hostile ones,
medians over the seeds. "honest alone" is the undefended mean of the clients that are not hostile: what could be had.

The default rule, clipping, is held to 1.1 times the clean error for what makes norms absurd. "Clean" is the same rule
over the same honest clients without the hostile ones. The undefended mean of those is another reference, which also
counts what clipping costs where nobody is hostile.

Cost: the wall time of ``aggregate`` over 100 clients in memory, with no defence and with each in turn, the fastest of
each. ``--out FILE`` writes the tables to a file as well, and a picture beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

import flexlora_fast as ff
from benchmarks.defence_plot import plot
from flexlora_fast import defence, threads
from flexlora_fast.defence import Coordinates, Defence
from tests.defences import ATTACKS, alike, attacked, error_of, error_to, scaled, task_of
from tests.rounds import Client, Layer

CLIENTS = 20
SHARES = (0.0, 0.1, 0.3)
SEEDS = range(7)
SPREADS = (0.2, 0.4)
LAYERS = (Layer("up", 96, 64), Layer("down", 64, 96))
FACTORS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 3.0, 5.0, 9.9, 10.0, 11.0, 12.0, 13.0, 15.0, 100.0, 1e6)
SHOWN = (1.5, 2.0, 9.9, 10.0, 100.0, 1e6)
ALLOWED = 1.1
# (layers, m = n, the ranks that clients have in turn, dtype); the last is the paper's protocol
COSTS = (
    (8, 1024, (8,), torch.float32),
    (4, 2048, (16,), torch.float32),
    (4, 2048, (16,), torch.bfloat16),
    (1, 2048, (8, 30, 200), torch.float32),
)
PEOPLE = 100
PATIENCE = 30.0  # seconds after which no further run is timed
TIMED = ("clip", "multi-krum", "geometric-median", "centred-clipping", "foolsgold")
Found = dict[str, dict[str, list[float]]]  # by rule and attack, the error for each share; NaN where the round stops
Kind = Defence | Coordinates | None


def rules(seed: int) -> dict[str, Kind]:
    """All that stand by themselves, and FLTrust with an honest server's update."""
    found: dict[str, Kind] = {"none": None}
    found |= {name: defence.get(name) for name in defence.RULES if name != "fltrust"}
    server = alike(CLIENTS + 1, LAYERS, seed, spread=SPREADS[0])[-1]
    return found | {"fltrust": defence.FLTrust(reference=server.adapter())}


def aggregated(clients: Sequence[Client], rule: Kind) -> ff.GlobalUpdate:
    return ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients], rank=64, defence=rule)


# -- every rule against every attack ---


def errors() -> Found:
    """Medians over the seeds; "honest alone" is one more rule."""
    every: dict[tuple[str, str, float], list[float]] = {}
    for seed in SEEDS:
        target, honest = task_of(LAYERS, seed), alike(CLIENTS, LAYERS, seed, spread=SPREADS[0])
        for share in SHARES:
            count = round(share * CLIENTS)
            alone = error_to(aggregated(honest[count:], None), target)
            for attack in ATTACKS:
                sent = attacked(honest, attack, count)
                every.setdefault(("honest alone", attack, share), []).append(alone)
                for name, rule in rules(seed).items():
                    every.setdefault((name, attack, share), []).append(error(sent, target, rule))
    names = dict.fromkeys(name for name, _, _ in every)
    return {
        name: {attack: [median(every[name, attack, share]) for share in SHARES] for attack in ATTACKS} for name in names
    }


def error(clients: Sequence[Client], target: dict, rule: Kind) -> float:
    try:
        return error_to(aggregated(clients, rule), target)
    except ff.errors.AdapterError:
        return math.nan


def error_lines(found: Found) -> Iterator[str]:
    yield f"| defence | {' | '.join(ATTACKS)} |"
    yield f"|---|{'---|' * len(ATTACKS)}"
    for name, rows in found.items():
        cells = [" / ".join("stops" if math.isnan(x) else f"{x:#.3g}" for x in row) for row in rows.values()]
        yield f"| {name} | {' | '.join(cells)} |"


# -- the default rule against absurd norms ---


def default_lines(spread: float) -> Iterator[str]:
    yield "| attack | hostile | error | × clean | × honest alone | to the honest mean: error | × clean |"
    yield "|---|---|---|---|---|---|---|"
    for share in SHARES[1:]:
        with threads.single():
            every = [measured(share, seed, spread) for seed in SEEDS]  # by seed and attack
        yield line("none", share, [found["none"] for found in every])
        yield line("NaN", share, [found["NaN"] for found in every])
        for factor in SHOWN:
            yield line(f"scaling ×{factor:g}", share, [found[f"{factor:g}"] for found in every])
        attacks = [f"{factor:g}" for factor in FACTORS]
        worst = max(attacks, key=lambda attack: median(found[attack][1] for found in every))
        yield line(f"scaling, worst factor: ×{worst}", share, [found[worst] for found in every])


def measured(share: float, seed: int, spread: float) -> dict[str, tuple[float, ...]]:
    """By attack: the error to the task, its ratio to the clean and to the undefended one, and the first two again for
    the error to the honest clients' mean.
    """
    target, clients = task_of(LAYERS, seed), alike(CLIENTS, LAYERS, seed, spread=spread)
    count = round(share * CLIENTS)
    honest = clients[count:]
    clean = aggregated(honest, defence.Clip())
    clean_error, clean_bias = error_to(clean, target), error_of(clean, honest)
    alone = error_to(aggregated(honest, None), target)

    def figures(sent: Sequence[Client]) -> tuple[float, ...]:
        update = aggregated(sent, defence.Clip())
        error, bias = error_to(update, target), error_of(update, honest)
        return error, error / clean_error, error / alone, bias, bias / clean_bias

    found = {"none": figures(honest), "NaN": figures(attacked(clients, "NaN", count))}
    return found | {f"{factor:g}": figures([*scaled(factor)(clients[:count]), *honest]) for factor in FACTORS}


def line(attack: str, share: float, figures: list[tuple[float, ...]]) -> str:
    """Medians over the seeds, and of ratios the range."""
    cells = []
    for i, values in enumerate(zip(*figures, strict=True)):
        middle = f"{median(values):.3f}"
        cells.append(middle if i in (0, 3) else f"{middle} ({min(values):.3f}…{max(values):.3f})")
    return f"| {attack} | {100 * share:.0f} % | {' | '.join(cells)} |"


# -- cost ---


def cost_lines(repeats: int) -> Iterator[str]:
    yield f"| layers | m = n | rank | dtype | solver | threads | none, s | {' | '.join(TIMED)} |"
    yield f"|---|---|---|---|---|---|---|{'---|' * len(TIMED)}"
    before = torch.get_num_threads()
    for layers, side, ranks, dtype in COSTS:
        adapters = people(layers, side, ranks, dtype)
        for count in range(1, (os.cpu_count() or 1) + 1):
            torch.set_num_threads(count)
            seconds = timed(adapters, repeats)
            solver = ", ".join(ff.aggregate(adapters, rank=16).solvers())
            over = [f"{100 * (seconds[rule] / seconds[None] - 1):.0f} %" for rule in TIMED]
            kind, mixed = str(dtype).removeprefix("torch."), "/".join(map(str, ranks))
            yield (
                f"| {layers} | {side} | {mixed} | {kind} | {solver} | {count} | {seconds[None]:.2f} "
                f"| {' | '.join(over)} |"
            )
    torch.set_num_threads(before)


def timed(adapters: Sequence[ff.Adapter], repeats: int) -> dict[str | None, float]:
    """Seconds by rule, the least of so many runs in turn, or as many as patience is for."""
    least: dict[str | None, float] = dict.fromkeys((None, *TIMED), math.inf)
    begun = time.perf_counter()
    for i in range(repeats):
        if i and time.perf_counter() - begun > PATIENCE:
            break
        for rule, best in least.items():
            start = time.perf_counter()
            ff.aggregate(adapters, rank=16, defence=rule)
            least[rule] = min(best, time.perf_counter() - start)
    return least


def people(layers: int, side: int, ranks: Sequence[int], dtype: torch.dtype) -> list[ff.Adapter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(PEOPLE):
        rank, state = ranks[i % len(ranks)], {}
        for layer in range(layers):
            for factor, shape in (("A", (rank, side)), ("B", (side, rank))):
                value = torch.randn(shape, generator=generator) / side**0.5
                state[f"base_model.model.l{layer}.lora_{factor}.weight"] = value.to(dtype)
        made.append(ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 2 * rank}, client=f"c{i:03d}"))
    return made


def coordinate_lines() -> Iterator[str]:
    """Median and trimmed mean look at every entry of every client: one small round says how slow that is."""
    yield "| clients | layers | m = n | rank | none, s | median, s | trimmed-mean, s |"
    yield "|---|---|---|---|---|---|---|"
    adapters = people(1, 1024, (8,), torch.float32)
    seconds = []
    for rule in (None, "median", "trimmed-mean"):
        start = time.perf_counter()
        ff.aggregate(adapters, rank=16, defence=rule)
        seconds.append(f"{time.perf_counter() - start:.2f}")
    yield f"| {PEOPLE} | 1 | 1024 | 8 | {' | '.join(seconds)} |"


def lines(found: Found, repeats: int) -> Iterator[str]:
    shares = " / ".join(f"{100 * share:.0f} %" for share in SHARES)
    yield "# Defences"
    yield ""
    yield (
        f"`python -m benchmarks.defences`, torch {torch.__version__}, {os.cpu_count()} CPUs. What the figures are: "
        "`benchmarks/defences.py`."
    )
    yield ""
    yield "![Error by attack and rule](defences.png)"
    yield ""
    yield f"## Error with {shares} hostile clients, median of {len(SEEDS)} seeds"
    yield ""
    yield from error_lines(found)
    for spread in SPREADS:
        yield ""
        yield f"## Clipping against absurd norms, clients' spread {spread}: median of {len(SEEDS)} seeds (range)"
        yield ""
        yield from default_lines(spread)
    yield ""
    yield f"## Cost at {PEOPLE} clients, over the same round without a defence"
    yield ""
    yield from cost_lines(repeats)
    yield ""
    yield from coordinate_lines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the tables, beside printing them; the picture goes beside")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each round whose time is taken")
    options = parser.parse_args()
    warnings.simplefilter("error")
    with threads.single():  # these layers are small
        found = errors()
    text = ""
    for each in lines(found, options.repeats):
        print(each, flush=True)
        text += f"{each}\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
        plot(found, SHARES, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
