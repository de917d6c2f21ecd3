"""A run's folder before its first round: the corpus as Arrow files, sorted by client, and who the clients are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from flexlora_fast import files
from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate import partition, ranks, tasks
from flexlora_fast.simulate.corpus import CLIENT, Corpus
from flexlora_fast.simulate.learners.base import About
from flexlora_fast.simulate.results import ABOUT, CLIENTS
from flexlora_fast.simulate.spec import Experiment

if TYPE_CHECKING:
    from datasets import Dataset

CATEGORY = "category"
# What random numbers are for, so that no two purposes share any: they are addressed by (seed, purpose, …).
PARTITION, RANKS, LIMIT, SAMPLE, DROPOUT, TRAIN, INITIAL, SPEED = range(8)


@dataclass
class Client:
    """One client of a run. Its rows are ``first`` … ``first + train - 1`` of the stored training data.

    Attributes:
        index: in the order of the run. type: label of its rank type. ranks: ``r`` and ``rank_pattern``, as PEFT has
            them. eval: how many test rows are its own. labels: rows of each class. category: of its first row.
    """

    index: int
    name: str
    type: str
    ranks: Mapping[str, Any]
    first: int
    train: int
    eval: int = 0
    labels: list[int] | None = None
    category: str | None = None


@dataclass(frozen=True)
class People:
    """The clients of a run, the ranks of their types from light to heavy, and what is known of the corpus."""

    clients: list[Client]
    types: dict[str, Mapping[str, Any]]
    about: About
    metric: str
    rows: dict[str, int] = field(default_factory=dict)


def prepare(experiment: Experiment, out: Path) -> People:
    """Load the task, share its rows out and write them below ``out``, unless that was done already.

    The training rows are stored sorted by client, so that a client is a slice: nothing needs an index of all rows, and
    processes map the same files. Raises ``OptionError`` where the data does not suffice, and what the task raises.
    """
    if not (out / CLIENTS).is_file():  # written last
        _write(experiment, out)
    return _read(experiment, out)


def _write(experiment: Experiment, out: Path) -> None:
    corpus = tasks.make(experiment.task["name"], experiment.task_options).load(experiment.seed)
    parts = _parts(experiment, corpus)
    types = ranks.assign(experiment.ranks, len(parts), (experiment.seed, RANKS))
    limit = experiment.evaluation.limit
    stored: dict[str, Dataset] = {"train": corpus.train.select(np.concatenate(list(parts.values())))}
    stored["test"] = limited(_tested(experiment, corpus, parts), limit, (experiment.seed, LIMIT, 0))
    if corpus.unseen is not None and experiment.evaluation.unseen:
        stored["unseen"] = limited(corpus.unseen, limit, (experiment.seed, LIMIT, 1))
    for name, kept in stored.items():
        if not len(kept):
            raise DataError(
                f"task {experiment.task['name']!r} leaves no row for {name!r}; have [task] hold out more of each client"
            )
    datasets.disable_progress_bars()
    for name, rows in stored.items():
        rows.save_to_disk(out / "data" / name)
    options: dict[str, Any] = {"labels": list(corpus.labels), "kind": corpus.kind, "metric": corpus.metric}
    options["rows"] = {name: len(rows) for name, rows in stored.items()}
    options["tested"] = {name: _digest(rows) for name, rows in stored.items() if name != "train"}
    write_json(out / ABOUT, options)
    own = _counts(stored["test"], CLIENT)
    classes = _column(corpus.train, "label") if corpus.labels else None
    categories = _column(corpus.train, CATEGORY) if CATEGORY in corpus.train.column_names else None
    attention = experiment.ranks.attention
    clients, first = [], 0
    for index, ((name, rows), kind) in enumerate(zip(parts.items(), types, strict=True)):
        client = Client(index, name, kind.label, ranks.config(kind, attention), first, len(rows), own.get(name, 0))
        if classes is not None:
            client.labels = np.bincount(classes[rows], minlength=len(corpus.labels)).tolist()
        if categories is not None:
            client.category = str(categories[rows[0]])
        clients.append(asdict(client))
        first += len(rows)
    write_json(out / CLIENTS, clients)


def _read(experiment: Experiment, out: Path) -> People:
    described = json.loads((out / ABOUT).read_text())
    clients = [Client(**client) for client in json.loads((out / CLIENTS).read_text())]
    about = About(described["kind"], tuple(described["labels"]), experiment.task["name"], experiment.task_options)
    types = {client.type: client.ranks for client in sorted(clients, key=lambda c: ranks.order(c.ranks))}
    return People(clients, types, about, described["metric"], described["rows"])


def _parts(experiment: Experiment, corpus: Corpus) -> dict[str, np.ndarray]:
    """Each client's rows of the training data, by name."""
    wanted, seed = experiment.clients, (experiment.seed, PARTITION)
    if wanted.partition == "natural":
        if CLIENT not in corpus.train.column_names:
            raise OptionError(
                f"clients.partition is 'natural', and task {experiment.task['name']!r} has no clients of its own; "
                "take 'dirichlet' or 'iid'"
            )
        return partition.natural(_column(corpus.train, CLIENT), wanted.number, wanted.smallest)
    assert wanted.number is not None
    if wanted.partition == "iid":
        parts = partition.iid(len(corpus.train), wanted.number, seed)
    else:
        by = "label" if "label" in corpus.train.column_names else CATEGORY
        if by not in corpus.train.column_names:
            raise OptionError(
                f"clients.partition is 'dirichlet', and task {experiment.task['name']!r} has neither labels nor "
                "categories to skew; take 'iid' or 'natural'"
            )
        assert wanted.alpha is not None
        classes = np.unique(_column(corpus.train, by), return_inverse=True)[1]
        parts = partition.dirichlet(classes, wanted.number, wanted.alpha, seed, wanted.smallest)
    width = len(str(len(parts)))
    return {f"client-{i + 1:0{width}d}": part for i, part in enumerate(parts)}


def _tested(experiment: Experiment, corpus: Corpus, parts: Mapping[str, Any]) -> Dataset:
    """The test rows: where clients are the rows' own, those of clients that train; the others take no part."""
    if experiment.clients.partition != "natural" or CLIENT not in corpus.test.column_names:
        return corpus.test
    owners = _column(corpus.test, CLIENT).astype(str)
    return corpus.test.select(np.flatnonzero(np.isin(owners, list(parts))))


def limited(rows: Dataset, limit: int | None, seed: tuple[int, ...]) -> Dataset:
    """``limit`` rows drawn at random, in their order; all of them where there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(np.random.SeedSequence(seed)).choice(len(rows), limit, replace=False)
    return rows.select(np.sort(chosen))


def _column(rows: Dataset, name: str) -> np.ndarray:
    """A column as an array, without decoding the others."""
    return rows.select_columns(name).with_format("numpy")[:][name]


def _counts(rows: Dataset, name: str) -> dict[str, int]:
    if name not in rows.column_names:
        return {}
    names, counts = np.unique(_column(rows, name), return_counts=True)
    return dict(zip(map(str, names), counts.tolist(), strict=True))


def _digest(rows: Dataset) -> str:
    """What tells apart the rows that two runs were tested on; images by their classes and order alone."""
    told = hashlib.sha256()
    for name in sorted({"prompt", "target", "text", "label", CLIENT} & set(rows.column_names)):
        told.update(f"{name}:{rows[name][:]!r}".encode())
    return told.hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write a document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, default=str, allow_nan=False) + "\n"
    files.replace(path, lambda to: Path(to).write_text(text))
