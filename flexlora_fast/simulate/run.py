"""A federated run from its experiment to its summary, taken up where it stopped."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flexlora_fast import files
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError, SimulationError
from flexlora_fast.simulate import metrics, pool
from flexlora_fast.simulate.corpus import CLIENT
from flexlora_fast.simulate.jobs import EvaluateJob, Model, Setup, Tested, Trained, TrainJob
from flexlora_fast.simulate.pool import Pool
from flexlora_fast.simulate.prepare import INITIAL, TRAIN, Client, People, prepare, write_json
from flexlora_fast.simulate.results import EXPERIMENT, SCORES, SUMMARY
from flexlora_fast.simulate.server import OPTIMIZERS, Server, Upload
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.state import SPARSE, State

LOCK = ".lock"
PARTS = 8  # that the rows of a test are shared out in: more than most machines have workers for one model


class Watcher:
    """What is told as a run goes on; this one keeps it to itself."""

    def begin(self, experiment: Experiment, people: People, done: list[dict[str, Any]]) -> None:
        """The clients are known; ``done``: lines of rounds from before."""

    def phase(self, number: int, what: str, total: int) -> None:
        """Round ``number`` begins ``what``, of ``total`` jobs."""

    def advance(self, count: int = 1) -> None:
        """Jobs of the phase have ended."""

    def line(self, line: dict[str, Any]) -> None:
        """A round has ended; its line of ``metrics.jsonl``."""


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
        force: remove an earlier run in ``out`` first.

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
            line |= self._trained_and_aggregated(number, seconds)
        line |= self._tested(number, seconds)
        seconds["total"] = time.perf_counter() - started
        metrics.append(self.out, line | {"seconds": seconds})
        self.lines.append(line | {"seconds": seconds})
        self.server.clean()
        self.watcher.line(self.lines[-1])

    def _trained_and_aggregated(self, number: int, seconds: dict[str, float]) -> dict[str, Any]:
        started = time.perf_counter()
        sampled, asked = self.server.sample(number)
        down = self.server.sent_bytes(sampled)
        done = self._train(number, asked)
        trained = time.perf_counter()
        outcome = self.server.aggregate([self._upload(number, client) for client in asked])
        self.server.advance(outcome, {name: result.rank for name, result in done.items()})
        seconds |= {"train": trained - started, "aggregate": time.perf_counter() - trained}
        answered = {client.name for client in asked}
        return {
            "sampled": [client.name for client in sampled],
            "dropped": [client.name for client in sampled if client.name not in answered],
            "refused": metrics.refusals(outcome.refused),
            "train": metrics.training(done),
            "update": None if outcome.update is None else self._updated(),
            "bytes": {"up": sum(trained.bytes for trained in done.values()), "down": down},
        }

    def _updated(self) -> dict[str, Any] | None:
        """Of the state's update; in an SLoRA stage adapters have none."""
        now = self.server.state
        return (
            None if now.update is None or now.sparse is not None else metrics.updating(now.update, self.server.by_type)
        )

    def _upload(self, number: int, client: Client) -> Upload:
        sparse = self._work(number, client) / SPARSE
        return Upload(client, self._work(number, client) / "adapter", sparse if sparse.is_file() else None)

    def _work(self, number: int, client: Client) -> Path:
        return self.state_folder / "work" / f"{number:05d}" / f"{client.index:06d}"

    def _train(self, number: int, clients: list[Client]) -> dict[str, Trained]:
        """Have these clients train, but for those that had done so before the run was stopped; by name."""
        done: dict[str, Trained] = {}
        jobs: list[TrainJob] = []
        for client in clients:
            folder = self._work(number, client)
            if (folder / "result.json").is_file():
                result = json.loads((folder / "result.json").read_text())
                done[client.name] = Trained(**_with_nan(result))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                jobs.append(self._job(number, client, folder / "adapter"))
        # The longest first, so that no worker is left with one at the end.
        jobs.sort(key=lambda job: job.rows[0] - job.rows[1])
        self.watcher.phase(number, "training", len(clients))
        self.watcher.advance(len(done))

        def keep(index: int, result: Trained) -> None:
            job = jobs[index]
            write_json(job.out.parent / "result.json", metrics.plain(asdict(result)))
            done[job.client] = result
            self.watcher.advance()

        self.pool.run(jobs, keep)
        return {client.name: done[client.name] for client in clients}

    def _job(self, number: int, client: Client, out: Path) -> TrainJob:
        seed = np.random.SeedSequence([self.experiment.seed, TRAIN, number, client.index]).generate_state(1)[0]
        sparse, model = self.server.sparse(client, out.parent / SPARSE), self.server.model_of(client)
        return TrainJob(
            client.name,
            (client.first, client.first + client.train),
            model if sparse is None else Model(model.adapter),  # what was trained so far is in ``sparse``
            out,
            int(seed),
            self.experiment.training.factor(number),
            sparse,
        )

    # -- tests ---

    def _tested(self, number: int, seconds: dict[str, float]) -> dict[str, Any]:
        """The ``test`` and ``unseen`` parts of a line, where this round is tested; scores by row go to a file."""
        evaluation, last = self.experiment.evaluation, number == self.experiment.rounds
        if number % evaluation.every and not last:
            return {"test": None, "unseen": None}
        started = time.perf_counter()
        every = evaluation.by_rank == "always" or (evaluation.by_rank == "last" and last)
        types = list(self.server.by_type) if every else [self.server.heaviest]
        parts = [part for part in ("test", "unseen") if part in self.people.rows]
        found = self._evaluate(number, types, parts)
        line: dict[str, Any] = {"test": None, "unseen": None}
        scores: dict[str, np.ndarray] = {}
        for part in parts:
            tested = {label: found[part, label] for label in types}
            line[part] = metrics.testing(self.people.metric, tested, types[-1], self._owners(part))
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
                rows = self.people.rows[part]
                pieces = min(PARTS, -(-rows // self.experiment.evaluation.batch))
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
        from datasets import load_from_disk

        rows = load_from_disk(self.out / "data" / part)
        return np.asarray(rows[CLIENT]) if CLIENT in rows.column_names else None

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


def _with_nan(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: ``metrics.plain`` wrote null."""
    return {key: float("nan") if value is None else value for key, value in result.items()}


def _save_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


# -- the folder ---


def _claim(experiment: Experiment, out: Path, resume: bool, force: bool) -> None:
    """Raise ``SimulationError`` where ``out`` holds anything that a run of this experiment must not touch."""
    held = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    if not held:
        out.mkdir(parents=True, exist_ok=True)
        return
    if EXPERIMENT not in held:
        raise SimulationError(f"{out} holds something else than a run ({', '.join(held[:4])} …); give another folder")
    if force:
        with _locked(out):
            for path in map(out.joinpath, held):
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
