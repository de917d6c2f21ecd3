"""What every stage of the gate shares: its options, its report, and how time is taken on a device.

A stage is a module run in a process of its own. It writes what it has found after every finding, so that a stage that
is stopped at its time limit leaves everything but the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS_GPU = "needs a GPU"
# Columns beyond k that range finders take, as everywhere in the suite.
OVERSAMPLING = 10


@dataclass(frozen=True)
class Options:
    """How a stage is run: where, at which sizes, in how much time, where its report and the other stages' are."""

    device: str
    quick: bool
    seconds: float
    out: Path

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def found(self, stage: str) -> dict[str, Any]:
        """What an earlier stage of this run reported; empty where it did not run."""
        file = self.out.with_name(f"{stage}.json")
        return dict(json.loads(file.read_text())) if file.is_file() else {}


class Report(dict[str, Any]):
    """A dictionary that is written to a file at every assignment, whole or not at all."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.write()

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.write()

    def write(self) -> None:
        """Needed by hand only after a change inside a value."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".writing")
        scratch.write_text(json.dumps(self, indent=1) + "\n")
        os.replace(scratch, self.file)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part whose failure is reported, fails the stage in the end, and keeps no other part from running."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.setdefault("errors", {})[what] = f"{type(error).__name__}: {error}"[:500]
            self.write()

    def skip(self, reason: str) -> None:
        """Say why this stage has nothing to report."""
        self["skipped"] = reason
        print(f"skipped: {reason}", flush=True)


class Deadline:
    """How much of a stage's time is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run(body: Callable[[Options, Report], None]) -> None:
    """Read a stage's options from the command line and run it."""
    parser = argparse.ArgumentParser(description="One stage of the GPU gate; `python -m benchmarks.gpu.gate` runs all.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit, for the stage to plan with")
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    given = parser.parse_args()
    report = Report(given.out)
    body(Options(given.device, given.quick, given.seconds, given.out), report)
    if errors := report.get("errors"):
        sys.exit("; ".join(f"{what}: {error}" for what, error in errors.items())[:280])


def synchronize(device: str) -> None:
    """Wait for everything that was given to the device."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def wall(call: Callable[[], object], device: str) -> float:
    """Seconds of one call by the host's clock, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], device: str, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of a call on the device's own clock (CUDA events), or the host's on a CPU."""
    for _ in range(warm_up):
        call()
    if not device.startswith("cuda"):
        return statistics.median(wall(call, device) for _ in range(repeats))
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3
