"""What a simulation left in its folder, read back with types: the spec, the clients, a line a round, the summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from flexlora_fast.errors import ResultsError, shown

EXPERIMENT, CLIENTS, METRICS = "experiment.json", "clients.json", "metrics.jsonl"
SUMMARY, SCORES = "summary.json", "scores.npz"
ABOUT = Path("data") / "about.json"  # the corpus
T = TypeVar("T")


class _Read(BaseModel):
    """Later versions may write more than this one reads."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Client(_Read):
    """One client: its ``type`` (of the rank distribution), ranks, examples, and how many it has of each label."""

    name: str
    type: str | None = None
    ranks: dict[str, Any] = Field(default_factory=dict)
    train: int
    eval: int = 0
    labels: list[int] | None = None
    category: str | None = None

    @property
    def rank(self) -> int | None:
        """Of the layers that ``rank_pattern`` does not name."""
        return self.ranks.get("r")

    @property
    def all_ranks(self) -> list[int]:
        """Every rank that it has in some layer, sorted."""
        pattern = self.ranks.get("rank_pattern") or {}
        return sorted({int(rank) for rank in (self.rank, *pattern.values()) if rank is not None})


class Trained(_Read):
    """One client's part in a round: mean loss (nats), examples seen, seconds, rank, and ‖ΔW‖_F of what it sent."""

    loss: float | None = None
    examples: int = 0
    seconds: float | None = None
    rank: int | None = None
    norm: float | None = None


class Training(_Read):
    """All of a round's training."""

    loss: float | None = None
    clients: dict[str, Trained] = Field(default_factory=dict)


class Score(_Read):
    """The metric in [0, 1] and the loss in nats, of what clients of one rank, or one client, got."""

    value: float
    loss: float | None = None
    n: int | None = None


class Test(Score):
    """The global model on the rows that nobody trains on; ``stderr`` is that of the mean over the rows.

    ``by_rank``: what each type of client is sent, by its ranks ("8", or "30/200" with others in the FFN).
    """

    __test__ = False  # no test case of pytest's
    metric: str
    stderr: float | None = None
    by_rank: dict[str, Score] = Field(default_factory=dict)
    by_client: dict[str, Score] = Field(default_factory=dict)


class Refusal(_Read):
    """A client whose upload was not taken."""

    client: str
    code: str = ""
    reason: str = ""


class Update(_Read):
    """The round's ΔW: its norm, the share of its energy that each type of client is sent (named as in
    ``Test.by_rank``), the singular values of its largest layer, its effective rank.
    """

    norm: float | None = None
    energy_kept: dict[str, float | None] = Field(default_factory=dict)
    spectrum: list[float] = Field(default_factory=list)
    effective_rank: float | None = None


class Traffic(_Read):
    """Bytes from the clients (``up``) and to them."""

    up: int = 0
    down: int = 0


class Round(_Read):
    """One line of ``metrics.jsonl``; round 0 is the model before any training."""

    round: int
    method: str = ""
    sampled: list[str] = Field(default_factory=list)
    dropped: list[str] = Field(default_factory=list)
    refused: list[Refusal] = Field(default_factory=list)
    train: Training | None = None
    test: Test | None = None
    unseen: Test | None = None
    update: Update | None = None
    bytes: Traffic | None = None
    seconds: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run: one method, one seed.

    Attributes:
        experiment: the resolved spec, as the file has it. rounds: in order; the first may be round 0.
        summary: None while it has not ended. scores: arrays by name, each with an entry a row of the test.
        tested: by part, a digest of the rows that it is tested on; empty where the run's folder does not say.
    """

    folder: Path
    experiment: Mapping[str, Any]
    clients: tuple[Client, ...]
    rounds: tuple[Round, ...]
    summary: Mapping[str, Any] | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    tested: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def name(self) -> str:
        return str(self.experiment.get("name") or self.folder.name)

    @property
    def method(self) -> str:
        found = (self.summary or {}).get("method") or next((line.method for line in self.rounds if line.method), None)
        return str(found or "unknown method")

    @property
    def seed(self) -> int:
        found = (self.summary or {}).get("seed", self.experiment.get("seed", 0))
        return int(found)

    def tests(self, part: str = "test") -> list[tuple[int, Test]]:
        """Round and score, of the rounds that were tested; ``part``: "test" or "unseen"."""
        found = ((line.round, getattr(line, part)) for line in self.rounds)
        return [(number, test) for number, test in found if test is not None]

    def updates(self) -> list[tuple[int, Update]]:
        """Round and update, of the rounds that have one."""
        return [(line.round, line.update) for line in self.rounds if line.update is not None]

    def last(self, part: str = "test") -> Test | None:
        """The score of the last round that was tested."""
        tests = self.tests(part)
        return tests[-1][1] if tests else None

    def best(self, part: str = "test") -> tuple[int, Test] | None:
        """The round with the highest score, the first of equals, and that score."""
        return max(self.tests(part), key=lambda found: found[1].value, default=None)

    @property
    def metric(self) -> str:
        found = self.last()
        return found.metric if found is not None else str((self.summary or {}).get("metric", "metric"))

    def seconds(self, part: str) -> float | None:
        """Mean seconds a round spent on that part, over the rounds that trained; None where no line says."""
        found = [line.seconds[part] for line in self.rounds if line.round > 0 and part in line.seconds]
        return sum(found) / len(found) if found else None

    def traffic(self) -> Traffic:
        """Bytes of all rounds together."""
        lines = [line.bytes for line in self.rounds if line.bytes is not None]
        return Traffic(up=sum(line.up for line in lines), down=sum(line.down for line in lines))


def read(folder: str | Path) -> Run:
    """The run in that folder, which may still be going on: its rounds are then those that have ended.

    Raises ``ResultsError`` where a file is missing or damaged, quoting the file, the line and what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / EXPERIMENT).is_file():
        raise ResultsError(
            f"{folder} has no {EXPERIMENT}: it is not the folder of a simulation; give the one that "
            "`flexlora-fast simulate --out` wrote"
        )
    summary = folder / SUMMARY
    return Run(
        folder=folder,
        experiment=_parse(folder / EXPERIMENT, TypeAdapter(dict[str, Any])),
        clients=tuple(_parse(folder / CLIENTS, TypeAdapter(list[Client]))),
        rounds=tuple(_rounds(folder / METRICS)),
        summary=_parse(summary, TypeAdapter(dict[str, Any])) if summary.is_file() else None,
        scores=_scores(folder / SCORES),
        tested=_tested(folder / ABOUT),
    )


def _tested(path: Path) -> dict[str, str]:
    about = _parse(path, TypeAdapter(dict[str, Any])) if path.is_file() else {}
    return dict(about.get("tested", {}))


def _rounds(path: Path) -> Iterator[Round]:
    if not path.exists():  # it begins with the first round
        return
    before = -1
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is being written
        found = _checked(line, TypeAdapter(Round), f"{path}, line {number}")
        if found.round <= before:
            raise ResultsError(
                f"{path}, line {number}: round {found.round} after round {before}; two runs wrote into one folder: "
                "run one of them again into a folder of its own"
            )
        before = found.round
        yield found


def _scores(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError) as error:
        raise ResultsError(f"{path} cannot be read ({error}); resume the run, which writes it again") from error


def _parse(path: Path, kind: TypeAdapter[T]) -> T:
    try:
        return _checked(path.read_bytes(), kind, str(path))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read ({error.strerror}); run the simulation again") from error


def _checked(text: bytes, kind: TypeAdapter[T], where: str) -> T:
    try:
        return kind.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "all of it"
        raise ResultsError(
            f"{where}: {field_name} is {shown(first['input'])}: {first['msg']}; the file was changed, or is another "
            "version's: run the simulation again"
        ) from error
    except ValueError as error:  # json's own, and UnicodeDecodeError
        raise ResultsError(
            f"{where}: no JSON ({error}): {shown(text)}; the file is damaged: run the simulation again"
        ) from error
