"""A federated run from its experiment to its summary, taken up where it stopped."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError, SimulationError
from flexlora_fast.simulate import metrics, pool
from flexlora_fast.simulate.asynchronous import Asynchronous
from flexlora_fast.simulate.jobs import Setup
from flexlora_fast.simulate.pool import Pool
from flexlora_fast.simulate.prepare import INITIAL, prepare, write_json
from flexlora_fast.simulate.results import CLIENTS, EXPERIMENT, METRICS, SCORES, SUMMARY
from flexlora_fast.simulate.server import OPTIMIZERS, Server
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.state import State
from flexlora_fast.simulate.synchronous import Synchronous
from flexlora_fast.simulate.testing import Tests
from flexlora_fast.simulate.training import Clients
from flexlora_fast.simulate.watcher import Watcher

LOCK = ".lock"


def run(
    experiment: Experiment,
    out: Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Play an experiment's rounds into the folder ``out``; returns its summary.

    Args:
        workers: processes (default: one for each GPU or core); 0 does everything in this one. The numbers that come out
            do not depend on it.
        resume: go on with what is in ``out``, which must be the same experiment; nothing there is a fresh start.
        force: remove an earlier run in ``out`` first; files beside it stay.

    Raises:
        SimulationError: a worker died; ``out`` is in use, holds something else, or an earlier run without ``resume``.
        OptionError, DataError and what else tasks, learners and the aggregator raise.
    """
    out = out.resolve()
    _claim(experiment, out, resume, force)
    with _locked(out):
        write_json(out / EXPERIMENT, experiment.to_dict())
        return _Run(experiment, out, watcher or Watcher()).play(pool.default_workers() if workers is None else workers)


class _Run:
    def __init__(self, experiment: Experiment, out: Path, watcher: Watcher) -> None:
        self.experiment, self.out, self.watcher = experiment, out, watcher
        self.state_folder = out / "state"
        self.people = prepare(experiment, out)
        if len(self.people.types) > 1 and not experiment.method.make().mixed:
            raise OptionError(
                f"method {experiment.method.name!r} needs equal ranks, and there are {', '.join(self.people.types)}; "
                "set ranks.everyone to 'smallest', or take a method for mixed ranks"
            )
        self.lines = metrics.lines(out)

    def play(self, workers: int) -> dict[str, Any]:
        """All rounds that are left."""
        self.watcher.begin(self.experiment, self.people, self.lines)
        if len(self.lines) <= self.experiment.rounds:
            with Pool(self._setup(), workers) as self.pool:
                self.server = self._server()
                clients = Clients(self.server, self.pool, self.watcher)
                kind = Synchronous if self.experiment.server.asynchronous is None else Asynchronous
                self.rounds: Synchronous | Asynchronous = kind(self.server, clients)
                self.tests = Tests(self.server, self.out, self.pool, self.watcher)
                for number in range(len(self.lines), self.experiment.rounds + 1):
                    self._round(number)
        summary = self._summary()
        write_json(self.out / SUMMARY, summary)
        return summary

    def _setup(self) -> Setup:
        experiment, method = self.experiment, self.experiment.method
        return Setup(
            data=self.out / "data",
            model=experiment.model,
            lora=experiment.lora,
            about=self.people.about,
            rank=max(max([kind["r"], *kind["rank_pattern"].values()]) for kind in self.people.types.values()),
            seed=int(np.random.SeedSequence([experiment.seed, INITIAL]).generate_state(1)[0]),
            training=experiment.training,
            batch=experiment.evaluation.batch,
            trains=method.make().trains,
            gamma=method.gamma,
            penalty=method.penalty,
        )

    def _server(self) -> Server:
        initial = self.state_folder / "initial"
        if not initial.is_dir():
            self.pool.run([initial])
        done = self.lines[-1]["round"] if self.lines else 0
        wanted = self.experiment.server.optimizer
        optimizer = None if wanted is None else OPTIMIZERS[wanted.name]
        state = State.load(self.state_folder / f"{done:05d}", optimizer) if done else State()
        return Server(self.experiment, self.people, self.state_folder, Adapter.load(initial).in_memory(), state)

    # -- a round ---

    def _round(self, number: int) -> None:
        """One round; round 0 only tests what everybody starts from. Its line is written last of all."""
        started = time.perf_counter()
        line: dict[str, Any] = {"round": number, "method": self.experiment.method.label or self.experiment.method.name}
        seconds: dict[str, float] = {}
        if number:
            line |= self.rounds.play(number, seconds)
        line |= self.tests.play(number, seconds)
        seconds["total"] = time.perf_counter() - started
        metrics.append(self.out, line | {"seconds": seconds})
        self.lines.append(line | {"seconds": seconds})
        self.server.clean(self.rounds.needed())
        self.watcher.line(self.lines[-1])

    def _summary(self) -> dict[str, Any]:
        tested = [line for line in self.lines if line["test"]]
        best = max(tested, key=lambda line: line["test"]["value"])
        kinds = {key for line in self.lines for key in line["seconds"]}
        return {
            "experiment": self.experiment.name,
            "method": self.experiment.method.label or self.experiment.method.name,
            "seed": self.experiment.seed,
            "metric": self.people.metric,
            "rounds": self.experiment.rounds,
            "final": tested[-1]["test"]["value"],
            "best": {"round": best["round"], "value": best["test"]["value"]},
            "unseen": (tested[-1]["unseen"] or {}).get("value"),
            "seconds": {key: sum(line["seconds"].get(key, 0.0) for line in self.lines) for key in sorted(kinds)},
            "scores": SCORES,
        }


# -- the folder ---


_OWN = {EXPERIMENT, CLIENTS, METRICS, SUMMARY, SCORES, "report.html", "data", "state"}


def _claim(experiment: Experiment, out: Path, resume: bool, force: bool) -> None:
    """Raise ``SimulationError`` where ``out`` holds anything that a run of this experiment must not touch."""
    held = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    if not held:
        out.mkdir(parents=True, exist_ok=True)
        return
    if EXPERIMENT not in held:
        raise SimulationError(f"{out} holds something else than a run ({', '.join(held[:4])} …); give another folder")
    if force or CLIENTS not in held:  # nothing has come of a run without clients, but a wrong [task] or a full disk
        with _locked(out):
            for path in map(out.joinpath, _OWN & set(held)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if not resume:
        raise SimulationError(f"{out} holds a run; --resume goes on with it, --force starts anew")
    before = json.loads((out / EXPERIMENT).read_text())
    now = experiment.to_dict()
    if before != now:
        key = next(key for key in {**now, **before} if now.get(key) != before.get(key))
        raise SimulationError(
            f"{out} holds another experiment: its {key} is {before.get(key)}, not {now.get(key)}; --force starts anew"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Within it no other process runs into this folder."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SimulationError(f"{out} is in use by another run; wait for it, or give another folder") from error
        yield
