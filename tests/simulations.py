"""A made-up task, and experiments on it that take a second: a random BERT of two layers, three clients, a step each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from flexlora_fast.simulate import tasks
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.tasks.base import Task, TaskOptions

WORDS = ("red", "green", "blue")


class Colours(Task):
    """Texts that name their class."""

    name = "colours"
    kind = "text"
    metric = "accuracy"
    summary = "made up"
    source = "this file"

    class Options(TaskOptions):
        rows: int = 60
        clients: int = 4

    def load(self, seed: int) -> Corpus:
        return Corpus("text", *(self.rows(seed, part) for part in range(3)), WORDS)

    def rows(self, seed: int, part: int) -> Dataset:
        assert isinstance(self.options, Colours.Options)
        random = np.random.default_rng([seed, part])
        labels = random.integers(0, len(WORDS), self.options.rows)
        owners = random.integers(0, self.options.clients, self.options.rows)
        return Dataset.from_dict(
            {
                "text": [f"{WORDS[label]} {random.integers(1000)}" for label in labels],
                "label": labels,
                "client": [f"owner {i}" for i in owners],
                "category": ["even" if i % 2 == 0 else "odd" for i in owners],
            }
        )


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task under its name, in this process."""
    known = tasks.task_class
    monkeypatch.setattr(tasks, "task_class", lambda name: Colours if name == "colours" else known(name))


def document(**changes: Any) -> dict[str, Any]:
    """An experiment as its file has it; ``clients__number=5`` changes a key of a table, None takes it away."""
    made: dict[str, Any] = {
        "name": "made up",
        "rounds": 2,
        "task": {"name": "colours"},
        "model": {"path": "tiny", "dtype": "float32"},
        "clients": {"number": 3, "partition": "dirichlet", "alpha": 1.0, "smallest": 4},
        "ranks": {"each": [1, 2, 4]},
        "training": {"steps": 1, "batch": 4, "lr": 1e-2},
        "evaluation": {"limit": 12, "batch": 12},
    }
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = made
        for name in tables:
            table = table.setdefault(name, {})
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    return made


def experiment(**changes: Any) -> Experiment:
    return Experiment.of(document(**changes), "made-up.toml")


def numbers(out: Path) -> list[str]:
    """The lines of ``metrics.jsonl`` without what a clock measured."""
    import json

    lines = []
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        line.pop("seconds")
        for trained in line.get("train", {}).get("clients", {}).values():
            trained.pop("seconds")
        lines.append(json.dumps(line))
    return lines
