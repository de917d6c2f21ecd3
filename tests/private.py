"""Private rounds for tests: clients that a policy admits, their clipped mean in float64, and rounds without noise.

Noise can be fixed or left away in tests alone, by putting another key, or another ``Noise``, in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast.privacy import mechanism
from flexlora_fast.privacy.mechanism import Release
from tests import defences, rounds, where
from tests.rounds import Client, Layer

KEY = bytes(range(32))
SCALE = 2.0
HEAD = "base_model.model.head.weight"


def member(name: str, model: str | Sequence[Layer] = "linear", rank: int = 4, **options: Any) -> Client:
    """A client at the scale of ``policy``, whatever its rank."""
    return rounds.client(name, model, rank=rank, alpha=SCALE * rank, **options)


def members(count: int, model: str | Sequence[Layer] = "linear", dtype: str = "float32", seed: int = 0) -> list[Client]:
    """Of ranks 1 … 4 and weights 0.25 … 1."""
    kinds = rounds.DTYPES[dtype]
    return [
        member(f"c{i:02d}", model, 1 + i % 4, seed=seed, weight=(1 + i % 4) / 4, dtype=kinds[i % len(kinds)])
        for i in range(count)
    ]


def with_head(client: Client, head: Tensor) -> Client:
    return client.but(extras={"head.weight": head}, config=client.config | {"modules_to_save": ["head"]})


def with_bias(client: Client, layer: str, bias: Tensor) -> Client:
    return client.but(bias={layer: bias}, config=client.config | {"lora_bias": True})


def policy(reference: Client | None = None, model: str | Sequence[Layer] = "linear", **rules: Any) -> ff.RoundPolicy:
    own = member("the server's", model, 8) if reference is None else reference
    return ff.RoundPolicy.from_adapter(own.adapter(), ranks=range(1, 129), scale="constant", **rules)


def privacy(**changes: Any) -> ff.Privacy:
    usual: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "rate": 1.0, "denominator": 4.0, "delta": 1e-6}
    return ff.Privacy(**usual | changes)


def aggregator(of: ff.Privacy | None = None, model: str | Sequence[Layer] = "linear", **options: Any) -> ff.Aggregator:
    given: dict[str, Any] = {"rank": 64, "device": where.DEVICE} | options
    given["policy"] = given.get("policy") or policy(model=model)
    return ff.Aggregator(privacy=of or privacy(), **given)


def aggregate(clients: Sequence[Client], of: ff.Privacy | None = None, **options: Any) -> ff.GlobalUpdate:
    agg = aggregator(of, **options)
    for c in clients:
        agg.add(c.adapter(), c.weight, client=c.name)
    return agg.finish()


def clipped_mean(clients: Sequence[Client], clip: float, denominator: float) -> np.ndarray:
    """(1/D)·Σ clip_C(w·ΔW) as one vector, laid out as ``flat`` does it."""
    X = defences.vectors(clients) * np.array([[c.weight] for c in clients])
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    return (X * np.minimum(1, clip / np.maximum(norms, 1e-300))).sum(axis=0) / denominator


def flat(update: ff.GlobalUpdate) -> np.ndarray:
    """All layers and their biases in a row, as ``defences.vectors`` has clients."""
    parts = []
    for layer in sorted(update.layers):
        parts.append(update.delta(layer).double().numpy().ravel())
        bias = update[layer].bias
        parts.append(np.zeros(update[layer].spec.m) if bias is None else bias.double().numpy())
    return np.concatenate(parts)


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise in every round."""
    monkeypatch.setattr(mechanism, "fresh_key", lambda: KEY)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds without noise, whose sums are rounded to a grid far below them."""

    class Silence:
        def __init__(self, *_: Any) -> None: ...

        def normal(self, start: int, count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.float64)

    monkeypatch.setattr(mechanism, "Noise", Silence)
    monkeypatch.setattr(mechanism, "_GRID", 2.0**40)


class Sums:
    """What ``Release.released`` is given: the clipped sums in float64 before any noise, by name and first entry."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[tuple[str, int], np.ndarray] = {}
        released = Release.released

        def spy(release: Release, name: str, total: Tensor, start: int = 0) -> Tensor:
            self.seen[name, start] = total.cpu().numpy().copy().ravel()
            return released(release, name, total, start)

        monkeypatch.setattr(Release, "released", spy)

    def of(self, clients: Sequence[Client], of: ff.Privacy, **options: Any) -> np.ndarray:
        """One vector of all that a round sums up."""
        self.seen.clear()
        aggregate(clients, of, **options)
        return np.concatenate([self.seen[place] for place in sorted(self.seen)])
