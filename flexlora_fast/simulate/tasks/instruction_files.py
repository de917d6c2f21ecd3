"""Readers of Natural Instructions: the FlexLoRA authors' files, the original repository, a file of clients, the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate.tasks import reading
from flexlora_fast.simulate.tasks.classifying import from_hub
from flexlora_fast.simulate.tasks.reading import Entry

HUB = "Muennighoff/natural-instructions"
_AUTHORS = "take data/1613 of github.com/alibaba/FederatedScope, branch FlexLoRA, as it is"
_ORIGINAL = "take a checkout of github.com/allenai/natural-instructions as it is"
_LINES = "a line holds client, category, instruction, and train, eval and test: lists of objects with input and output"


@dataclass(frozen=True)
class Example:
    """An input, and its right answers."""

    text: str
    answers: list[str]


@dataclass(frozen=True)
class Client:
    """A task, its instruction, and its examples."""

    name: str
    category: str
    instruction: str
    train: Sequence[Example] = ()
    eval: Sequence[Example] = ()
    test: Sequence[Example] = ()

    def held_out(self, part: str) -> Sequence[Example]:
        """The examples that nobody trains on: "eval" or "test"."""
        return self.eval if part == "eval" else self.test

    def without_longer(self, most: int | None) -> Client:
        """Without the examples that have more than ``most`` characters in input and first answer together."""
        if most is None:
            return self

        def short(examples: Sequence[Example]) -> list[Example]:
            return [x for x in examples if len(x.text) + len(x.answers[0]) <= most]

        return replace(self, train=short(self.train), eval=short(self.eval), test=short(self.test))

    def latin(self) -> float:
        """The share of ASCII among the letters of instruction, inputs and answers."""
        examples = [*self.train, *self.eval, *self.test]
        text = self.instruction + "".join(x.text + "".join(x.answers) for x in examples)
        letters = sum(map(str.isalpha, text))
        return sum(x.isascii() and x.isalpha() for x in text) / letters if letters else 0.0


class Source(Protocol):
    """Where clients are read from, one by one."""

    @property
    def names(self) -> Sequence[str]:
        """Of all clients."""

    def read(self, name: str) -> Client:
        """One of them."""

    def test_tasks(self) -> list[str]:
        """The names of those that the data set itself keeps for testing."""


def open_source(path: Path | None, share: float, seed: int) -> Source:
    """The reader of what lies at ``path``. Raises ``DataError`` where that is none of the known forms."""
    if path is None:
        return HubTasks(share, seed)
    if path.is_file():
        return ClientLines(path)
    if any(path.glob("local_training_*.json")):
        return AuthorsFiles(path)
    if (path / "tasks").is_dir():
        return OriginalTasks(path, share, seed)
    raise DataError(
        f"{path}: is no file, and has neither local_training_*.json nor tasks/ in it; {_AUTHORS}, or {_ORIGINAL}"
    )


class AuthorsFiles:
    """``local_training_<i>.json``, ``local_eval_<i>.json`` and ``local_test_<i>.json`` of each client.

    Each is a list of objects with ``instruction``, ``input``, ``output`` and ``category``, which is that and the number
    of the task: "Program Execution 1006.json".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = [x.stem.removeprefix("local_training_") for x in path.glob("local_training_*.json")]

    def read(self, name: str) -> Client:
        """The three files of a client."""
        parts = {
            part: reading.array(self.path / f"local_{word}_{name}.json", _AUTHORS)
            for part, word in (("train", "training"), ("eval", "eval"), ("test", "test"))
        }
        if not parts["train"]:
            raise DataError(f"{self.path / f'local_training_{name}.json'}: is empty; {_AUTHORS}")
        first = parts["train"][0]
        category = re.sub(r"\s+\d+\.json$", "", first.text("category"))
        examples = {part: [_example(entry) for entry in entries] for part, entries in parts.items()}
        return Client(name, category, first.text("instruction"), **examples)

    def test_tasks(self) -> list[str]:
        """These files do not say."""
        raise OptionError(f"task.unseen 'test_tasks': {self.path} has no such list; say how many clients are unseen")


class ClientLines:
    """One JSON object a line: ``client``, ``category``, ``instruction`` and the three parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Entry] = {}
        for entry in reading.lines(path, _LINES):
            number = entry.values.get("client")
            name = str(number) if type(number) is int else entry.text("client")
            if self._entries.setdefault(name, entry) is not entry:
                raise DataError(f"{entry.where}: client {name!r} has a line already; {_LINES}")
        self.names = list(self._entries)

    def read(self, name: str) -> Client:
        """A line."""
        entry = self._entries[name]
        parts = {part: [_example(x) for x in entry.entries(part)] for part in ("train", "eval", "test")}
        return Client(name, entry.text("category"), entry.text("instruction"), **parts)

    def test_tasks(self) -> list[str]:
        """This file does not say."""
        raise OptionError(f"task.unseen 'test_tasks': {self.path} has no such list; say how many clients are unseen")


@dataclass
class OriginalTasks:
    """``tasks/task*.json`` with ``Definition``, ``Categories`` and ``Instances``, a share of which is split 8:1:1.

    That is how the authors made theirs: a tenth at random, 80 % of it to train, 10 % each for evaluation and test
    (sizes of their files).
    """

    path: Path
    share: float
    seed: int
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [x.stem for x in (self.path / "tasks").glob("task*.json")]

    def read(self, name: str) -> Client:
        """The file of a task."""
        entry = reading.document(self.path / "tasks" / f"{name}.json", _ORIGINAL)
        examples = [Example(x.text("input"), x.texts("output")) for x in entry.entries("Instances")]
        definition = "\n".join(entry.texts("Definition"))
        return _split(Client(name, entry.texts("Categories")[0], definition), examples, self.share, self.seed)

    def test_tasks(self) -> list[str]:
        """The English test tasks of Super-NaturalInstructions."""
        path = self.path / "splits" / "default" / "test_tasks.txt"
        if not path.is_file():
            raise DataError(f"{path}: is not there; {_ORIGINAL}")
        return path.read_text().split()


class HubTasks:
    """The copy on the hub: columns ``task_name``, ``id``, ``definition``, ``inputs``, ``targets``; no categories."""

    def __init__(self, share: float, seed: int) -> None:
        from datasets import concatenate_datasets

        parts = from_hub(HUB, ["task_name", "id", "definition", "inputs", "targets"])
        self._rows = concatenate_datasets([parts["train"], parts["test"]])
        self._test = sorted(set(parts["test"]["task_name"]))
        self.share, self.seed = share, seed
        tasks = np.asarray(self._rows["task_name"][:])
        order = np.argsort(tasks, kind="stable")
        names, starts = np.unique(tasks[order], return_index=True)
        self.names = [str(name) for name in names]
        self._at = dict(zip(self.names, np.split(order, starts[1:]), strict=True))

    def read(self, name: str) -> Client:
        """The rows of a task; those of one id are one input with several answers."""
        rows = self._rows.select(self._at[name])
        answers: dict[tuple[str, str], list[str]] = {}
        for key, text, target in zip(rows["id"], rows["inputs"], rows["targets"], strict=True):
            answers.setdefault((key, text), []).append(target)
        examples = [Example(text, found) for (_, text), found in answers.items()]
        return _split(Client(name, "", rows["definition"][0]), examples, self.share, self.seed)

    def test_tasks(self) -> list[str]:
        """The tasks in its split "test"."""
        return self._test


def _example(entry: Entry) -> Example:
    return Example(entry.text("input"), entry.texts("output"))


def _split(client: Client, examples: Sequence[Example], share: float, seed: int) -> Client:
    """A share of the examples at random, at least three, split 8:1:1; which ones depends on the task's name too."""
    generator = np.random.default_rng([seed, *client.name.encode()])
    kept = [examples[i] for i in generator.permutation(len(examples))[: max(3, round(share * len(examples)))]]
    tenth = max(1, len(kept) // 10)
    return replace(client, test=kept[:tenth], eval=kept[tenth : 2 * tenth], train=kept[2 * tenth :])
