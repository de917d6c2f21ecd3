"""Federated fine-tuning with mixed LoRA ranks on real text, start to end: ``make demo`` or ``python -m examples.demo``.

Clients with skewed shares of the TREC questions fine-tune one pretrained sentence encoder, each with the LoRA rank it
can afford and the ordinary ``transformers.Trainer``. flexlora_fast aggregates their adapters and hands each client one
of its own rank for the next round. Two arms, same clients, same data order, same number of steps:

- FlexLoRA with ranks 2 to 32;
- FedIT (averaging A and B) where all must share the smallest rank.

Tables go to standard output; adapters, plot and figures to ``demo/``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flexlora_fast as ff
from examples import demo_data, demo_train
from examples.demo_data import LABELS, Question
from examples.demo_server import Federation, Round, contract_error
from examples.demo_train import Setup

RANKS = (2, 2, 4, 4, 8, 8, 16, 32)
T = TypeVar("T")
J = TypeVar("J")


@dataclass(frozen=True)
class Options:
    """The command line; see ``parse``."""

    data: Path
    out: Path
    rounds: int
    clients: int
    seeds: list[int]
    alpha: float
    steps: int
    test: int

    @property
    def ranks(self) -> list[int]:
        return sorted(RANKS[i % len(RANKS)] for i in range(self.clients))


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path(".demo-data"), help="folder with the two wheels (default: %(default)s)")
    add("--out", type=Path, default=Path("demo"), help="folder for adapters, plot and figures (default: %(default)s)")
    add("--rounds", type=int, default=6)
    add("--clients", type=int, default=8, help=f"with ranks {', '.join(map(str, RANKS))}, repeated beyond 8")
    add("--seeds", type=int, nargs="+", default=[0], help="each is a run of both arms with its own split")
    add("--alpha", type=float, default=0.3, help="of the Dirichlet split; smaller is more skewed")
    add("--steps", type=int, default=8, help="optimizer steps of 32 questions, per client and round")
    add("--quick", action="store_true", help="2 rounds of 2 steps and 200 test questions, to see it run")
    chosen = vars(parser.parse_args(arguments))
    quick = chosen.pop("quick")
    if quick:
        chosen.update(rounds=2, steps=2)
    for name in ("rounds", "clients", "steps", "alpha"):
        if chosen[name] <= 0:
            parser.error(f"--{name} must be positive, not {chosen[name]}")
    return Options(test=200 if quick else 1000, **chosen)


# -- running ---


def workers(setup: Setup, jobs: int) -> ProcessPoolExecutor:
    """One process per core, at most one per job of a round, each with the base model loaded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ProcessPoolExecutor(
        min(cores, jobs),
        mp_context=multiprocessing.get_context("spawn"),  # a fork would inherit torch's threads in an unknown state
        initializer=demo_train.start,
        initargs=(setup,),
    )


def run_all(pool: Executor, function: Callable[[J], T], jobs: Sequence[J], what: str, shown: bool) -> list[T]:
    """Run all jobs, with a progress bar where it is shown; results in the order of the jobs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=len(jobs))
        futures = [pool.submit(function, job) for job in jobs]
        for future in as_completed(futures):
            future.result()  # a failed client ends the demo at once, with its traceback
            bar.advance(task)
    return [future.result() for future in futures]


def play_round(
    number: int, federations: Sequence[Federation], pool: Executor, test: np.ndarray, last: bool, shown: bool
) -> None:
    """One round of all federations side by side: train, aggregate, hand back, evaluate."""
    jobs = [job for federation in federations for job in federation.train_jobs(number)]
    trained = iter(run_all(pool, demo_train.train, jobs, f"round {number}: training", shown))
    seconds, losses, tests = {}, {}, {}
    for federation in federations:
        losses[federation.name, federation.seed] = float(np.mean([next(trained)[0] for _ in federation.clients]))
        seconds[federation.name, federation.seed] = federation.aggregate(number)
        ranks = federation.ranks if last else (min(federation.ranks), max(federation.ranks))
        for rank, job in federation.evaluate_jobs(number, test, ranks).items():
            tests[federation.name, federation.seed, rank] = job
    found = run_all(pool, demo_train.evaluate, list(tests.values()), f"round {number}: evaluating", shown)
    scores = dict(zip(tests, found, strict=True))
    for federation in federations:
        key = federation.name, federation.seed
        assert federation.update is not None
        kept = max(layer.rank for layer in federation.update.values())
        federation.rounds.append(
            Round(
                number,
                losses[key],
                {rank: score for (*owner, rank), score in scores.items() if tuple(owner) == key},
                [federation.update.energy_kept(rank) for rank in range(1, kept + 1)],
                seconds[key],
            )
        )


def federate(
    options: Options, model: Path, questions: Sequence[Question], console: Console, setup: Setup | None = None
) -> list[Federation]:
    """Run both arms for every seed, printing as rounds end."""
    labels = [question.label for question in questions]
    demo_train.settle()
    setup = setup or Setup(model, [question.text for question in questions], labels, steps=options.steps)
    # One test set for all seeds and arms, so that they can be compared question by question.
    train, test = demo_data.hold_out(len(questions), options.test, seed=0)
    federations = []
    for seed in options.seeds:
        parts = demo_data.dirichlet_split([labels[i] for i in train], options.clients, options.alpha, seed)
        examples = [train[part] for part in parts]
        console.print(clients_table(options.ranks, examples, labels, seed))
        initial = demo_train.build(model, max(options.ranks), setup.alpha_over_r, seed)
        for name, method, ranks in (
            ("flexlora", "flexlora", options.ranks),
            ("fedit", "fedit", [min(options.ranks)] * options.clients),
        ):
            folder = options.out / name / f"seed-{seed}"
            federations.append(Federation(name, method, ranks, examples, seed, folder))
            federations[-1].begin(ff.Adapter.from_peft(initial))
    shown = sys.stderr.isatty()
    with workers(setup, len(federations) * options.clients) as pool:
        for number in range(1, options.rounds + 1):
            play_round(number, federations, pool, test, number == options.rounds, shown)
            console.print(round_table(number, federations))
    return federations


# -- telling ---


def standard_error(correct: np.ndarray) -> float:
    """Of a mean over test questions."""
    return float(correct.std(ddof=1) / len(correct) ** 0.5)


def clients_table(ranks: Sequence[int], examples: Sequence[np.ndarray], labels: Sequence[int], seed: int) -> Table:
    table = Table("client", "rank", "questions", *LABELS, title=f"Clients, seed {seed}", title_justify="left")
    for i, (rank, part) in enumerate(zip(ranks, examples, strict=True)):
        counts = np.bincount([labels[j] for j in part], minlength=len(LABELS))
        table.add_row(f"client-{i + 1}", str(rank), str(len(part)), *map(str, counts))
    return table


def round_table(number: int, federations: Sequence[Federation]) -> Table:
    table = Table(title=f"Round {number}", title_justify="left")
    for heading in ("arm", "seed", "accuracy", "loss", "at smallest r", "energy kept", "train loss", "aggregation"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for federation in federations:
        result = federation.rounds[number - 1]
        low, high = min(result.scores), max(result.scores)
        best = result.scores[high]
        energy = [f"{result.energy[rank - 1]:.1%} (r={rank})" for rank in sorted({low, high})]
        table.add_row(
            f"{federation.name} r={high}" if low == high else f"{federation.name} r={low}…{high}",
            str(federation.seed),
            f"{best.accuracy:.3f} ± {standard_error(best.correct):.3f}",
            f"{best.loss:.3f}",
            f"{result.scores[low].accuracy:.3f}",
            "\n".join(energy),
            f"{result.train_loss:.3f}",
            f"{result.aggregation_s:.2f} s",
        )
    return table


def ranks_table(federations: Sequence[Federation]) -> Table:
    """What each client rank is handed after the last round, tested on the same questions."""
    table = Table(title="After the last round, by client rank", title_justify="left")
    for heading in ("arm", "seed", "rank", "accuracy", "loss", "energy kept"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for federation in federations:
        result = federation.rounds[-1]
        for rank, score in result.scores.items():
            accuracy = f"{score.accuracy:.3f} ± {standard_error(score.correct):.3f}"
            energy = f"{result.energy[rank - 1]:.1%}"
            table.add_row(federation.name, str(federation.seed), str(rank), accuracy, f"{score.loss:.3f}", energy)
    return table


def compare(federations: Sequence[Federation]) -> dict[str, Any]:
    """FlexLoRA − FedIT at each arm's largest rank: for each seed by round, and over seeds (None for a single one).

    The two are tested on the same questions, so the standard error is that of the paired difference.
    """
    arms = {(f.name, f.seed): [r.scores[max(r.scores)].correct.astype(float) for r in f.rounds] for f in federations}
    per_seed = []
    for seed in dict.fromkeys(f.seed for f in federations):
        gaps = [mixed - plain for mixed, plain in zip(arms["flexlora", seed], arms["fedit", seed], strict=True)]
        per_seed.append(
            {
                "seed": seed,
                "by_round": [float(gap.mean()) for gap in gaps],
                "difference": float(gaps[-1].mean()),
                "standard_error": standard_error(gaps[-1]),
            }
        )
    if len(per_seed) == 1:
        return {"per_seed": per_seed, "over_seeds": None}
    by_round = np.array([entry["by_round"] for entry in per_seed]).T
    over = [{"mean": float(gaps.mean()), "standard_error": standard_error(gaps)} for gaps in by_round]
    return {"per_seed": per_seed, "over_seeds": over}


def verdict(comparison: dict[str, Any]) -> str:
    """The comparison in words, with what it can and cannot show."""
    lines = ["FlexLoRA − FedIT, in points of accuracy:"]
    for entry in comparison["per_seed"]:
        rounds = " ".join(f"{100 * gap:+.1f}" for gap in entry["by_round"])
        lines.append(
            f"  seed {entry['seed']}: {100 * entry['difference']:+.1f} ± {100 * entry['standard_error']:.1f} after the "
            f"last round (standard error over the test questions, paired); by round {rounds}"
        )
    over = comparison["over_seeds"]
    if over is None:
        lines.append(
            "One seed is one split, one initialisation and one data order, which that standard error leaves out: this "
            "shows that the loop works, and proves little about which method is better."
        )
    else:
        means = "  ".join(f"{100 * gap['mean']:+.1f} ± {100 * gap['standard_error']:.1f}" for gap in over)
        lines.append(
            f"  {len(comparison['per_seed'])} seeds, by round: {means}   (standard error over splits, initialisations "
            "and data orders)"
        )
    return "\n".join(lines)


def results(options: Options, federations: Sequence[Federation], comparison: dict[str, Any], contract: float) -> dict:
    """Everything that was measured, ready for JSON."""
    return {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
        "base_dtype": str(demo_train.base_dtype()).removeprefix("torch."),
        "comparison": comparison,
        "contract_relative_error": contract,
        "federations": [
            {
                "arm": federation.name,
                "seed": federation.seed,
                "ranks": federation.ranks,
                "questions": [len(part) for part in federation.examples],
                "rounds": [
                    {
                        "round": r.number,
                        "train_loss": r.train_loss,
                        "accuracy": {rank: score.accuracy for rank, score in r.scores.items()},
                        "loss": {rank: score.loss for rank, score in r.scores.items()},
                        "energy_kept": r.energy,
                        "aggregation_s": r.aggregation_s,
                    }
                    for r in federation.rounds
                ],
            }
            for federation in federations
        ],
    }


def report(options: Options, federations: list[Federation], test: int, console: Console) -> None:
    """Final tables, the check of the contract, the plot and the JSON file."""
    from examples import demo_plots

    console.print(ranks_table(federations))
    mixed = next(federation for federation in federations if federation.name == "flexlora")
    client = mixed.clients[options.clients // 2]
    contract = contract_error(mixed, options.rounds, client)
    rank = mixed.ranks[options.clients // 2]
    console.print(
        f"Checked: what {client} was handed in the last round, s'·B'·A' of rank {rank}, equals the float64 truncated "
        f"SVD of Σ w·s·B·A in every layer; largest relative error {contract:.1e}."
    )
    comparison = compare(federations)
    console.print(verdict(comparison))
    plot = demo_plots.plot(federations, test, options.out / "demo.png")
    figures = options.out / "results.json"
    figures.write_text(json.dumps(results(options, federations, comparison, contract), indent=1) + "\n")
    console.print(f"Plot: {plot}   figures: {figures}   adapters: {options.out}/<arm>/seed-<n>/round-<n>/")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    started = time.perf_counter()
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    try:
        model = demo_data.unpack(demo_data.MINILM, options.data)
        questions = demo_data.read_questions(
            demo_data.unpack(demo_data.QUESTIONS, options.data) / demo_data.QUESTIONS.files[0]
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    federations = federate(options, model, questions, console)
    report(options, federations, options.test, console)
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
