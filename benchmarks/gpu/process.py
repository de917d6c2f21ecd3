"""Running one stage as a process with a time limit, and showing how it goes: a live line on a terminal, plain lines
in a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from benchmarks.gpu.commit import ROOT

_POLL = 0.1
# Seconds between an interrupt, at which pytest still says what it found, and the end.
_GRACE = 8.0
_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


class Ran(NamedTuple):
    """How a process ended; ``code`` is None where it was stopped at its limit."""

    code: int | None
    seconds: float
    output: str

    @property
    def last(self) -> str:
        """The last line that says anything."""
        return next((line.strip()[:300] for line in reversed(self.output.splitlines()) if line.strip()), "no output")


class Show:
    """What is seen of a run."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.status: Status | None = None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, name: str, title: str, box: float) -> None:
        """A stage starts."""
        if self.console.is_terminal:
            self.status = self.console.status(f"{name}: {title} (at most {box:.0f} s)")
            self.status.start()
        else:
            self.line(f"{name}: {title} (at most {box:.0f} s) …")

    def tick(self, name: str, seconds: float, last: str) -> None:
        """A stage is still running."""
        if self.status is not None:
            self.status.update(f"{name}: {seconds:.0f} s  [dim]{escape(last[:80])}[/dim]")

    def end(self, name: str, record: Mapping[str, Any]) -> None:
        """A stage has ended."""
        if self.status is not None:
            self.status.stop()
            self.status = None
        outcome = record["outcome"]
        reason = f": {record['reason']}" if record["reason"] else ""
        self.console.print(
            f"{name}: {outcome} in {record['seconds']:.1f} s{reason}", style=_COLOURS[outcome], markup=False
        )
        if not self.console.is_terminal:
            for line in record.get("tail", [])[-12:]:
                self.line(f"    {line[:200]}")


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str], show: Show) -> Ran:
    """Run ``command`` with its output in ``log``; at its limit interrupt it, then kill it with all that it started."""
    start = time.monotonic()
    name = log.stem
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment),
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        stopped = False
        grace = min(_GRACE, 0.1 * seconds)
        try:
            while process.poll() is None:
                taken = time.monotonic() - start
                if not stopped and taken > seconds - grace:
                    stopped = True
                    _signal(process, signal.SIGINT)
                if taken > seconds:
                    break
                show.tick(name, taken, _last_line(log))
                time.sleep(_POLL)
        finally:
            _signal(process, signal.SIGKILL)  # also what it left behind
            process.wait()
    code = None if stopped else process.returncode
    return Ran(code, time.monotonic() - start, log.read_text(errors="replace"))


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process and all that it started and that did not leave its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
