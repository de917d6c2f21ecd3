"""A run as it is seen in a terminal: live bars, and a line a round; in a pipe the lines alone."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flexlora_fast import tables
from flexlora_fast.simulate.prepare import People
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.watcher import Watcher


class Terminal(Watcher):
    """Bars on stderr where that is a terminal, and lines on stdout. Used as a context manager; ``quiet`` shows none."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = sys.stderr.isatty() and not quiet
        self.bars = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
            redirect_stdout=sys.stdout.isatty(),  # where stdout is a log, lines belong there, bars or not
        )
        self.rounds: TaskID | None = None
        self.part: TaskID | None = None

    def __enter__(self) -> Terminal:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bars.stop()

    def begin(self, experiment: Experiment, people: People, done: list[dict[str, Any]]) -> None:
        counts = {label: sum(client.type == label for client in people.clients) for label in people.types}
        ranks = ", ".join(f"{count}× r={label}" for label, count in counts.items())
        clients = tables.count(len(people.clients), "client")
        self.print(f"{tables.clean(experiment.name)}: {clients} ({ranks}), {people.rows['test']} test rows")
        if done:
            self.print(f"going on after round {done[-1]['round']}")
        self.rounds = self.bars.add_task("rounds", total=experiment.rounds, completed=max(0, len(done) - 1))

    def phase(self, number: int, what: str, total: int) -> None:
        if self.part is not None:
            self.bars.remove_task(self.part)
        self.part = self.bars.add_task(f"round {number}: {what}", total=total)

    def advance(self, count: int = 1) -> None:
        if self.part is not None:
            self.bars.advance(self.part, count)

    def line(self, line: dict[str, Any]) -> None:
        parts = [f"round {line['round']}"]
        if line.get("train"):
            parts.append(f"train loss {tables.number(line['train']['loss'])}")
        for part in ("test", "unseen"):
            if line[part]:
                score = line[part]
                parts.append(f"{part} {score['metric']} {score['value']:.3f}, loss {tables.number(score['loss'])}")
        missing = [f"{len(line[key])} {key}" for key in ("dropped", "refused") if line.get(key)]
        self.print("  ".join([*parts, *missing, f"{line['seconds']['total']:.1f} s"]))
        if self.rounds is not None:
            self.bars.update(self.rounds, completed=line["round"])

    def print(self, text: str) -> None:
        if self.quiet:
            return
        if self.bars.disable or not sys.stdout.isatty():
            print(text, flush=True)
        else:
            self.bars.console.print(text, highlight=False, markup=False)
