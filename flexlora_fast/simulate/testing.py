"""Tests of the global model: as types of clients have it, on parts of the data, shared out over the pool."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from flexlora_fast import files
from flexlora_fast.simulate import metrics
from flexlora_fast.simulate.corpus import CLIENT
from flexlora_fast.simulate.jobs import EvaluateJob, Tested
from flexlora_fast.simulate.pool import Pool
from flexlora_fast.simulate.results import SCORES
from flexlora_fast.simulate.server import Server
from flexlora_fast.simulate.watcher import Watcher

PARTS = 8  # that the rows of a test are shared out in: more than most machines have workers for one model


class Tests:
    """Tests what ``server`` holds, in ``pool``; scores by row go to a file in ``out``."""

    __test__ = False  # no test case of pytest's

    def __init__(self, server: Server, out: Path, pool: Pool, watcher: Watcher) -> None:
        self.server, self.out, self.pool, self.watcher = server, out, pool, watcher

    def play(self, number: int, seconds: dict[str, float]) -> dict[str, Any]:
        """The ``test`` and ``unseen`` parts of a line, where this round is tested; scores by row go to a file."""
        evaluation, last = self.server.experiment.evaluation, number == self.server.experiment.rounds
        if number % evaluation.every and not last:
            return {"test": None, "unseen": None}
        started = time.perf_counter()
        every = evaluation.by_rank == "always" or (evaluation.by_rank == "last" and last)
        types = list(self.server.by_type) if every else [self.server.heaviest]
        parts = [part for part in ("test", "unseen") if part in self.server.people.rows]
        found = self._evaluate(number, types, parts)
        line: dict[str, Any] = {"test": None, "unseen": None}
        scores: dict[str, np.ndarray] = {}
        for part in parts:
            tested = {label: found[part, label] for label in types}
            line[part] = metrics.testing(self.server.people.metric, tested, types[-1], self._owners(part))
            for label, one in tested.items():
                scores |= {f"{part}/{label}": one.values, f"{part}/{label}/loss": one.loss}
            scores |= {part: tested[types[-1]].values, f"{part}/loss": tested[types[-1]].loss}
        files.replace(self.out / SCORES, lambda to: _save_arrays(to, scores))
        seconds["evaluate"] = time.perf_counter() - started
        return line

    def _evaluate(self, number: int, types: Sequence[str], parts: Sequence[str]) -> dict[tuple[str, str], Tested]:
        """Each part of the data with the model of each type."""
        jobs: dict[tuple[str, str, int], EvaluateJob] = {}
        for label in types:
            model = self.server.model(label)
            for part in parts:
                # The same pieces whatever the number of workers: how rows are batched may move the last bit.
                rows = self.server.people.rows[part]
                pieces = min(PARTS, -(-rows // self.server.experiment.evaluation.batch))
                cuts = [rows * i // pieces for i in range(pieces + 1)]
                for i, span in enumerate(itertools.pairwise(cuts)):
                    jobs[part, label, i] = EvaluateJob(model, part, span)
        self.watcher.phase(number, "testing", len(jobs))
        results = self.pool.run(list(jobs.values()), lambda *_: self.watcher.advance())
        found: dict[tuple[str, str], list[Tested]] = {}
        for (part, label, _), result in zip(jobs, results, strict=True):
            found.setdefault((part, label), []).append(result)
        return {
            key: Tested(np.concatenate([r.values for r in pieces]), np.concatenate([r.loss for r in pieces]))
            for key, pieces in found.items()
        }

    def _owners(self, part: str) -> np.ndarray | None:
        """Whose each row of a part is, where rows have clients."""
        rows = load_from_disk(self.out / "data" / part)
        return np.asarray(rows[CLIENT]) if CLIENT in rows.column_names else None


def _save_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
