"""Clients of a round at work: jobs for the pool, and what those before an interruption had left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexlora_fast.simulate import metrics
from flexlora_fast.simulate.jobs import Model, Sparse, Trained, TrainJob
from flexlora_fast.simulate.pool import Pool
from flexlora_fast.simulate.prepare import TRAIN, Client, write_json
from flexlora_fast.simulate.server import Server, Upload
from flexlora_fast.simulate.state import SPARSE
from flexlora_fast.simulate.watcher import Watcher


@dataclass(frozen=True)
class Ask:
    """A client to train from ``model``; ``key`` is its own in the round, ``draw`` addresses its random numbers."""

    client: Client
    model: Model
    key: int
    draw: tuple[int, int]


class Clients:
    """Has clients train, in any order and in any process, with the same results."""

    def __init__(self, server: Server, pool: Pool, watcher: Watcher) -> None:
        self.server, self.pool, self.watcher = server, pool, watcher
        self.experiment = server.experiment

    def train(self, number: int, asks: Sequence[Ask]) -> dict[str, Trained]:
        """Have these clients train, but for those that had done so before the run was stopped; by name."""
        done: dict[str, Trained] = {}
        jobs: list[TrainJob] = []
        for ask in asks:
            folder = self._work(number, ask)
            if (folder / "result.json").is_file():
                result = json.loads((folder / "result.json").read_text())
                done[ask.client.name] = Trained(**_with_nan(result))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                jobs.append(self._job(number, ask, folder))
        # The longest first, so that no worker is left with one at the end.
        jobs.sort(key=lambda job: job.rows[0] - job.rows[1])
        self.watcher.phase(number, "training", len(asks))
        self.watcher.advance(len(done))

        def keep(index: int, result: Trained) -> None:
            job = jobs[index]
            write_json(job.out.parent / "result.json", metrics.plain(asdict(result)))
            done[job.client] = result
            self.watcher.advance()

        self.pool.run(jobs, keep)
        return {ask.client.name: done[ask.client.name] for ask in asks}

    def upload(self, number: int, ask: Ask) -> Upload:
        """What it sent, once it has trained."""
        folder = self._work(number, ask)
        return Upload(ask.client, folder / "adapter", folder / SPARSE if (folder / SPARSE).is_file() else None)

    def _work(self, number: int, ask: Ask) -> Path:
        return self.server.folder / "work" / f"{number:05d}" / f"{ask.key:06d}"

    def _job(self, number: int, ask: Ask, folder: Path) -> TrainJob:
        seed = np.random.SeedSequence([self.experiment.seed, TRAIN, *ask.draw]).generate_state(1)[0]
        sparse: Sparse | None = self.server.sparse(ask.client, folder / SPARSE)
        client = ask.client
        return TrainJob(
            client.name,
            (client.first, client.first + client.train),
            ask.model if sparse is None else Model(ask.model.adapter),  # what was trained so far is in ``sparse``
            folder / "adapter",
            int(seed),
            self.experiment.training.factor(number),
            sparse,
        )


def _with_nan(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: ``metrics.plain`` wrote null."""
    return {key: float("nan") if value is None else value for key, value in result.items()}
