"""Who is told what a run does."""

from __future__ import annotations

from typing import Any

from flexlora_fast.simulate.prepare import People
from flexlora_fast.simulate.spec import Experiment


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
