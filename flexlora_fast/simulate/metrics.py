"""A line of ``metrics.jsonl``: what a round did, in numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlora_fast.simulate.jobs import Tested, Trained
from flexlora_fast.simulate.results import METRICS
from flexlora_fast.update import GlobalUpdate, Refusal

SPECTRUM = 64  # singular values that a line keeps


def training(done: Mapping[str, Trained]) -> dict[str, Any]:
    """The ``train`` part: each client's, and the mean loss over the examples that were seen."""
    seen = sum(trained.examples for trained in done.values())
    loss = math.fsum(trained.loss * trained.examples for trained in done.values()) / seen if seen else math.nan
    clients = {
        name: {
            "loss": trained.loss,
            "examples": trained.examples,
            "seconds": trained.seconds,
            "rank": trained.rank,
            "norm": trained.norm,
        }
        for name, trained in done.items()
    }
    return {"loss": loss, "clients": clients}


def testing(metric: str, by_type: Mapping[str, Tested], heaviest: str, clients: np.ndarray | None) -> dict[str, Any]:
    """The ``test`` part: of the heaviest type, and by type; ``clients``: whose each row is, where rows have clients."""
    best = by_type[heaviest]
    n = len(best.values)
    return {
        "metric": metric,
        "n": n,
        **_means(best),
        "stderr": float(best.values.std(ddof=1) / n**0.5) if n > 1 else None,
        "by_rank": {label: _means(tested) for label, tested in by_type.items()},
        "by_client": {} if clients is None else _grouped(best, clients),
    }


def _means(tested: Tested) -> dict[str, Any]:
    return {"value": float(tested.values.mean()), "loss": float(tested.loss.mean())}


def _grouped(tested: Tested, clients: np.ndarray) -> dict[str, Any]:
    names, owner = np.unique(clients, return_inverse=True)
    counts = np.bincount(owner)
    values, losses = np.bincount(owner, tested.values) / counts, np.bincount(owner, tested.loss) / counts
    return {
        str(name): {"value": float(value), "loss": float(loss), "n": int(n)}
        for name, value, loss, n in zip(names, values, losses, counts, strict=True)
    }


def updating(update: GlobalUpdate, by_type: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The ``update`` part: ‖ΔW‖_F, the energy that each type of client is sent, and the spectrum.

    The effective rank is exp of the entropy of σ/Σσ (Roy & Vetterli, EUSIPCO 2007), averaged over the layers.
    """
    largest = max(update.values(), key=lambda layer: layer.norm)
    energy = math.fsum(layer.energy for layer in update.values())
    kept = {}
    for label, ranks in by_type.items():
        lost = math.fsum(layer.cut_off(layer.given(ranks[name])) ** 2 for name, layer in update.items())
        kept[label] = 1 - lost / energy if energy else 1.0
    effective = [_effective(S) for layer in update.values() for S in layer.S.reshape(-1, layer.S.shape[-1])]
    return {
        "norm": update.norm,
        "energy_kept": kept,
        "spectrum": largest.S.reshape(-1, largest.S.shape[-1])[0, :SPECTRUM].tolist(),
        "effective_rank": math.fsum(effective) / len(effective),
    }


def _effective(S: torch.Tensor) -> float:
    S = S[S > 0].double()
    share = S / S.sum()
    return float((-(share * share.log()).sum()).exp()) if len(S) else 0.0


def refusals(refused: Sequence[Refusal]) -> list[dict[str, str]]:
    return [{"client": item.client, "code": item.code, "reason": item.reason} for item in refused]


# -- the file ---


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Add a line, on disk once this returns."""
    text = json.dumps(plain(line), allow_nan=False) + "\n"
    with (out / METRICS).open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of rounds that ended; what is left of one whose writing was cut short is removed from the file."""
    path = out / METRICS
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def plain(value: Any) -> Any:
    """JSON has no NaN: what diverged has no number."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
