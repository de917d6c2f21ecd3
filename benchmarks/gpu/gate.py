"""The GPU gate: ``python3 -m benchmarks.gpu.gate`` builds, measures, checks and tests on one GPU, in 8 minutes.

Needs no network and nothing but the packages that are there; imports none of them itself but rich. Every stage is a
process with a time limit of its own: one that fails or hangs is recorded, the others run, and the exit code says so.
The tests come last and get all the time that is left: on a machine that is lent, measurements are what cannot be had
elsewhere. Missed targets are reported and fail nothing.

Environment:
    FLEXLORA_COMMIT   the commit, where the tree has no git history
    OUT               a folder that gets copies of the results and of the stages' output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import commit, install, process, table

ROOT = commit.ROOT
WORK = ROOT / ".bench-data" / "gpu-gate"
TOTAL = 480.0
# Characters of a stage's output that are kept.
_LOG = 1 << 20
_TAIL = 30


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: a module of this package, or another program, and the seconds that it may take."""

    name: str
    seconds: float
    title: str

    def command(self, python: str, seconds: float, given: argparse.Namespace, report: Path) -> list[str]:
        if self.name == "tests":
            return tests_command(python, given)
        module = {"build": "install", "loop": "peers"}.get(self.name, self.name)
        options = ["--device", given.device, "--seconds", f"{seconds:.0f}", "--out", str(report)]
        return [python, "-m", f"benchmarks.gpu.{module}", *options, *["--quick"] * given.quick]


STAGES = (
    Stage("build", 65, "extension and an installation for this run"),
    Stage("ceilings", 15, "copy, matrix and PCIe rates"),
    Stage("warm", 35, "kernels compiled"),
    Stage("round", 50, "round-7b, factors resident"),
    Stage("streamed", 70, "round-7b, factors in host memory and files"),
    Stage("solvers", 25, "small dense problems against the libraries"),
    Stage("loop", 35, "the authors' loop on round-7b"),
    Stage("layers", 45, "single layers against peers"),
    Stage("roofline", 25, "each op against the ceilings"),
    Stage("ncu", 35, "hardware counters of the kernels"),
    Stage("sanitize", 50, "memcheck and racecheck of the kernels"),
    Stage("tests", TOTAL, "the test suite on the device"),
)


def tests_command(python: str, given: argparse.Namespace) -> list[str]:
    """The whole suite, or one file of it where only the gate itself is tried."""
    command = [python, "-m", "pytest", "-q", "-rfE", "--device", given.device, "-p", "no:cacheprovider"]
    if given.quick:
        return [*command, "tests/test_random.py"]
    return [*command, "-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]


def pytest_counts(output: str) -> dict[str, Any]:
    """What pytest's last lines say: counts, and the names of what failed."""
    words = re.findall(r"(\d+) (passed|failed|skipped|xfailed|errors?|deselected)\b", output)
    failed = [
        " ".join(line.split()[1:])[:200] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))
    ]
    return {"counts": {word: int(number) for number, word in words}, "failed": failed[:60]}


def judged(stage: Stage, ran: process.Ran, found: dict[str, Any], box: float) -> dict[str, Any]:
    """A stage's record: outcome, why, its time, and what it reported."""
    outcome, reason = "passed", ""
    if ran.code is None:
        outcome, reason = "failed", f"stopped at its limit of {box:.0f} s"
    elif ran.code != 0:
        outcome, reason = "failed", f"exit code {ran.code}: {ran.last}"
    elif "skipped" in found:
        outcome, reason = "skipped", str(found["skipped"])
    record = {"outcome": outcome, "reason": reason, "seconds": round(ran.seconds, 1), "box_seconds": round(box)}
    if outcome == "failed":
        record["tail"] = ran.output.splitlines()[-_TAIL:]
    return record | {"data": found}


def run_stage(stage: Stage, python: str, box: float, given: argparse.Namespace, show: process.Show) -> dict[str, Any]:
    """Run a stage and read its report, whatever became of it."""
    report = given.work / f"{stage.name}.json"
    environment = install.environment(given.python)
    if stage.name == "tests":  # many processes of small matrices: threads would only compete
        environment["OMP_NUM_THREADS"] = "1"
    ran = process.run(
        stage.command(python, box, given, report), box, given.work / f"{stage.name}.log", environment, show
    )
    try:
        found = json.loads(report.read_text()) if report.is_file() else {}
    except json.JSONDecodeError as error:
        found = {"unreadable": str(error)}
    if stage.name == "tests":
        found = pytest_counts(ran.output)
    # The results are kept for others: nothing in them about whose machine it was.
    return json.loads(json.dumps(judged(stage, ran, found, box)).replace(json.dumps(str(ROOT))[1:-1], "."))


def run_all(given: argparse.Namespace, stages: Sequence[Stage] = STAGES) -> dict[str, Any]:
    """All stages in order, within the total time; the results, written after each."""
    start = time.monotonic()
    known = commit.find(ROOT)
    results: dict[str, Any] = {
        "kind": "gpu",
        "quick": given.quick,
        "device": given.device,
        "commit_info": {"id": known.id, "source": known.source},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "stages": {},
    }
    given.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:  # of an earlier run
        for suffix in (".json", ".log"):
            (given.work / stage.name).with_suffix(suffix).unlink(missing_ok=True)
    (given.work / table.PICTURE).unlink(missing_ok=True)
    show = process.Show()
    if known.id == commit.UNKNOWN:
        show.line(f"WARNING: the commit is unknown: {known.source}")
    for stage in stages:
        left = given.total - (time.monotonic() - start)
        box = min(stage.seconds, left)
        show.begin(stage.name, stage.title, box)
        if box < 1:
            record = {"outcome": "failed", "reason": f"no time left of {given.total:.0f} s", "seconds": 0.0, "data": {}}
        else:
            # Where the installation failed, stages are still tried with the Python that was given.
            built = results["stages"].get("build", {}).get("data", {}).get("python")
            python = str(ROOT / built) if built and stage.name != "build" else given.python
            record = run_stage(stage, python, box, given, show)
        results["stages"][stage.name] = record
        results["seconds"] = round(time.monotonic() - start, 1)
        keep(results, given.work)
        show.end(stage.name, record)
    return results


def keep(results: dict[str, Any], work: Path) -> None:
    """Write the results so far, and copies for whoever set OUT: with the picture, and what all stages printed."""
    write(results, work / table.NAME, work)
    if out := os.environ.get("OUT"):
        folder = Path(out)
        write(results, folder / table.NAME, work)
        logs = [(name, work / f"{name}.log") for name in results["stages"]]
        printed = [f"===== {name}\n{log.read_text(errors='replace')[-_LOG:]}\n" for name, log in logs if log.is_file()]
        (folder / "gate.log").write_text("\n".join(printed))


def write(results: dict[str, Any], file: Path, work: Path) -> None:
    """Write the results, and beside them what a stage drew in ``work``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    drawn = work / table.PICTURE
    if drawn.is_file() and file.parent != work:
        shutil.copyfile(drawn, file.with_name(table.PICTURE))


def results_file(results: dict[str, Any], given: argparse.Namespace) -> Path:
    """Where the results belong: with those of this GPU, unless it was only a trial, or there was none."""
    if given.results:
        return Path(given.results)
    folder = None if given.quick else table.folder_of(results)
    return given.work / table.NAME if folder is None else ROOT / folder / table.NAME


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only with --quick")
    parser.add_argument("--quick", action="store_true", help="sizes that take a CPU seconds: to try the gate itself")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--results", type=Path, help="default: in benchmarks/results, by the GPU's name")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.quick:
        parser.error("a full run needs a GPU; `--quick --device cpu` tries the gate on a CPU")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    results = run_all(given, [stage for stage in STAGES if stage.name in given.stages])
    file = results_file(results, given)
    write(results, file, given.work)
    print(f"\n{table.summary(results)}\n\nresults: {file}", flush=True)
    return int(any(record["outcome"] == "failed" for record in results["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
