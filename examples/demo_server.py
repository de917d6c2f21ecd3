"""The server's side of the demo: one federation, that is one method, its clients' ranks, and their rounds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import flexlora_fast as ff
from examples.demo_train import EvaluateJob, Score, TrainJob


@dataclass(frozen=True)
class Round:
    """What one round gave. ``scores`` by rank; ``energy`` kept at ranks 1, 2, …, the largest kept."""

    number: int
    train_loss: float
    scores: dict[int, Score]
    energy: list[float]
    aggregation_s: float


@dataclass
class Federation:
    """One arm with one seed. Clients are ``client-1`` … in the order of ``examples`` and ``ranks``."""

    name: str
    method: str
    ranks: list[int]
    examples: list[np.ndarray]
    seed: int
    folder: Path
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = [f"client-{i + 1}" for i in range(len(self.ranks))]
        self.update: ff.GlobalUpdate | None = None

    def path(self, number: int, *parts: str) -> Path:
        return self.folder.joinpath(f"round-{number:02d}", *parts)

    def begin(self, initial: ff.Adapter) -> None:
        """Hand each client the server's initial adapter, cut to its rank (as "round 0").

        All clients of both arms start from one adapter rather than from an initialisation of their own: FedIT
        averages the factors themselves, and the mean of eight unrelated random A would be a handicap that its
        authors did not give it. FlexLoRA does not care, since B = 0 makes every start the same ΔW = 0.
        """
        shutil.rmtree(self.folder, ignore_errors=True)  # rounds of an earlier, longer run would stand beside these
        for client, rank in zip(self.clients, self.ranks, strict=True):
            cut(initial, rank).save(self.path(0, "sent", client))

    def train_jobs(self, number: int) -> list[TrainJob]:
        """The round's work, one job a client, in client order. Seeds do not depend on the arm."""
        return [
            TrainJob(
                client,
                examples,
                self.path(number - 1, "sent", client),
                self.path(number, "clients", client),
                int(np.random.SeedSequence([self.seed, number, i]).generate_state(1)[0]),
            )
            for i, (client, examples) in enumerate(zip(self.clients, self.examples, strict=True))
        ]

    def aggregate(self, number: int) -> float:
        """The server's part of a round: read the clients' folders, aggregate, write each its adapter. Seconds."""
        started = time.perf_counter()
        aggregator = ff.Aggregator(method=self.method, progress=False)
        for client, examples in zip(self.clients, self.examples, strict=True):
            aggregator.add(self.path(number, "clients", client), weight=len(examples), client=client)
        self.update = aggregator.finish()
        for client in self.clients:
            self.update.adapter(client=client).save(self.path(number, "sent", client))
        return time.perf_counter() - started

    def evaluate_jobs(self, number: int, test: np.ndarray, ranks: Iterable[int]) -> dict[int, EvaluateJob]:
        """The global model as clients of these ranks see it."""
        client = dict(zip(self.ranks, self.clients, strict=True))
        return {rank: EvaluateJob(self.path(number, "sent", client[rank]), test) for rank in sorted(set(ranks))}


def cut(adapter: ff.Adapter, rank: int) -> ff.Adapter:
    """The first ``rank`` rows of A and columns of B in each layer, at the scale they have."""
    factors = {}
    for layer in adapter.layers:
        A, B = adapter.factors(layer)
        factors[layer] = (A[:, :rank], B[:, :, :rank])
    specs = {layer: adapter.spec(layer) for layer in adapter.layers}
    scales = {layer: adapter.scale(layer) for layer in adapter.layers}
    return ff.Adapter.from_factors(factors, specs, scales, adapter.config, extras=adapter.extras)


def contract_error(federation: Federation, number: int, client: str) -> float:
    """The largest relative error, over the layers, of what a client was handed against the definition.

    For each layer ‖s'·B'·A' − SVD_r'(Σ w·s·B·A)‖_F / ‖SVD_r'(Σ w·s·B·A)‖_F, from the saved folders alone, with the
    sum and its full SVD dense and in float64.
    """
    sizes = np.array([len(examples) for examples in federation.examples], dtype=float)
    sent = ff.Adapter.load(federation.path(number, "sent", client))
    adapters = [ff.Adapter.load(federation.path(number, "clients", name)) for name in federation.clients]
    worst = 0.0
    for layer in sent.layers:
        total = sum(w * dense(a, layer) for w, a in zip(sizes / sizes.sum(), adapters, strict=True))
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        rank = sent.rank(layer)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        worst = max(worst, float((dense(sent, layer) - best).norm() / best.norm()))
    return worst


def dense(adapter: ff.Adapter, layer: str) -> torch.Tensor:
    """s·B·A in float64."""
    A, B = adapter.factors(layer)
    return adapter.scale(layer) * (B[0].double() @ A[0].double())
