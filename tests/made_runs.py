"""Folders as a simulation leaves them, with figures made up from a formula: for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RANKS = (2, 2, 4, 4, 8, 8, 16, 32)
LABELS = ("abbreviation", "entity", "description", "human", "location", "number")


def make(
    folder: Path,
    *,
    name: str = "made",
    method: str = "flexlora",
    seed: int = 0,
    rounds: int = 6,
    gain: float = 0.5,
    ranks: tuple[int, ...] = RANKS,
    finished: bool = True,
    rows: int = 200,
    labels: bool = True,
) -> Path:
    """A run whose score goes from 0.2 up by ``gain``; seeds differ by some hundredths."""
    draw = np.random.default_rng(seed)  # the same for all methods: pairs are alike
    own = np.random.default_rng([seed, sum(map(ord, name + method))])
    clients = [f"client-{i + 1}" for i in range(len(ranks))]
    counts = draw.multinomial(60, draw.dirichlet([0.3] * len(LABELS)), len(ranks)) if labels else None
    spec: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "task": {"name": "trec"},
        "method": {"name": method},
        "ranks": {"each": list(ranks)},
        "training": {"lr": 1e-3, "batch": 16, "steps": 5},
    }
    write(folder / "experiment.json", spec)
    people = [
        {
            "name": client,
            "type": str(rank),
            "ranks": {"r": rank, "rank_pattern": {}},
            "train": 60,
            "eval": 0,
            "labels": None if counts is None else counts[i].tolist(),
            "category": None if labels else f"kind {i % 3}",
        }
        for i, (client, rank) in enumerate(zip(clients, ranks, strict=True))
    ]
    write(folder / "clients.json", people)
    write(folder / "data" / "about.json", {"labels": list(LABELS)})
    luck = draw.normal(0, 0.03)
    lines = [line(i, rounds, method, clients, ranks, gain, luck, own, rows) for i in range(rounds + 1)]
    if not finished:
        lines = lines[:-2]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if finished:
        value = lines[-1]["test"]["value"]
        write(folder / "summary.json", {"method": method, "seed": seed, "metric": "accuracy", "final": value})
        correct = np.zeros(rows)
        correct[: round(value * rows)] = 1.0
        np.savez(folder / "scores.npz", test=draw.permutation(correct))
    return folder


def line(
    number: int,
    rounds: int,
    method: str,
    clients: list[str],
    ranks: tuple[int, ...],
    gain: float,
    luck: float,
    own: np.random.Generator,
    rows: int,
) -> dict[str, Any]:
    value = float(np.clip(0.2 + (gain + luck) * (1 - np.exp(-number / (0.4 * rounds))) + own.normal(0, 0.008), 0, 1))
    kinds = sorted(set(ranks))
    by_rank = {str(r): {"value": value - 0.1 / r, "loss": 2 * (1 - value) + 0.1 / r} for r in kinds}
    test = {
        "metric": "accuracy",
        "n": rows,
        "value": value,
        "stderr": (value * (1 - value) / rows) ** 0.5,
        "loss": 2 * (1 - value),
        "by_rank": by_rank,
        "by_client": {},
    }
    if number == 0:
        return {"round": 0, "method": method, "test": test, "unseen": None, "seconds": {"evaluate": 0.9, "total": 0.9}}
    spectrum = np.exp(-np.arange(max(ranks)) * (0.1 + 0.08 * number))
    energy = (spectrum**2).cumsum() / (spectrum**2).sum()
    here = [c for c in clients if own.random() > 0.15] or clients
    gone = here[:1] if number == 2 else []
    trained = {
        c: {"loss": 2 / number, "examples": 80, "seconds": 1.0, "rank": ranks[clients.index(c)], "norm": 0.4}
        for c in here
        if c not in gone
    }
    p = spectrum**2 / (spectrum**2).sum()
    return {
        "round": number,
        "method": method,
        "sampled": here,
        "dropped": gone,
        "refused": [{"client": here[-1], "code": "norm", "reason": "‖ΔW‖_F is 1e9 <b>"}] if number == 3 else [],
        "train": {"loss": 1.9 / number**0.5, "clients": trained},
        "test": test,
        "unseen": None,
        "update": {
            "norm": 2.0 + 0.2 * number,
            "energy_kept": {str(r): float(energy[r - 1]) for r in kinds},
            "spectrum": (3 * spectrum).tolist(),
            "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
        },
        "bytes": {"up": 800_000 * len(here), "down": 900_000 * len(here)},
        "seconds": {"train": 4.0 + own.random(), "aggregate": 0.06, "evaluate": 0.9, "total": 5.2},
    }


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
