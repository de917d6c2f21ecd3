"""Fuzzing of the gate, guided by coverage: ``make fuzz``, or ``python -m benchmarks.fuzz --inputs 1000000``.

atheris (libFuzzer for Python; ``pip install 'flexlora_fast[fuzz]'``) calls the targets of ``tests/fuzzing.py``, which
hold every answer of the gate against an oracle. A crash is any input that is neither refused with a known reason
nor admitted rightly; it is saved, and the run goes on. A hang is one that takes more than a second, the best of three.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SHARES = {"file": 3, "config": 3, "bent": 2}  # tasks of each target; all of one size
HANG = 1.0  # seconds
LONGEST = {"file": 6000, "config": 4000, "bent": 120}  # bytes of an input
_EVERY = 1000  # inputs between two records on disk
_RESTARTS = 20  # of a task whose process dies


@dataclass
class Record:
    """What one process did; on disk, so that it outlives the process."""

    inputs: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)  # where it was raised -> the file of the first such input
    crashed: int = 0
    hangs: int = 0
    slowest: float = 0.0  # seconds
    before: int = 0  # KiB of memory before the first input
    peak: int = 0  # KiB
    left: int = 0  # temporary files and descriptors that stayed
    edges: int = 0
    corpus: int = 0

    def save(self, path: Path) -> None:
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        path.with_suffix(".new").replace(path)


# -- in the process that fuzzes ---


def work(target: str, runs: int, seed: int, folder: Path) -> None:
    """Fuzz one target; what was done is in ``folder/record.json`` by the time the process ends."""
    import atheris

    with atheris.instrument_imports(include=["flexlora_fast"]):
        from tests import fuzzing

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in fuzzing.seeds(target):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    tokens = folder / "tokens"
    escaped = ("".join(rf"\x{x:02x}" for x in word) for word in fuzzing.words(target))
    tokens.write_text("".join(f'"{word}"\n' for word in escaped))
    session = Session(fuzzing.TARGETS[target], runs, folder)
    arguments = [f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST[target]}", "-len_control=0", "-timeout=30"]
    arguments += [f"-artifact_prefix={folder}/killed-", "-rss_limit_mb=4096"]
    arguments += [f"-dict={tokens}"] if tokens.stat().st_size else []
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], session.one)
    atheris.Fuzz()


class Session:
    """The function that the fuzzer calls, and its record."""

    def __init__(self, call: Any, runs: int, folder: Path) -> None:
        self.call, self.runs, self.folder = call, runs, folder
        self.record, self.outcomes = Record(before=_peak()), Counter[str]()
        self.started, self.open = time.perf_counter(), len(os.listdir("/proc/self/fd"))

    def one(self, data: bytes) -> None:
        start = time.perf_counter()
        try:
            self.outcomes[self.call(data)] += 1
        except Exception as error:
            self.crash(data, error)
        seconds = time.perf_counter() - start
        if seconds > HANG:
            seconds = min(seconds, *(self.again(data) for _ in range(2)))
            if seconds > HANG:
                self.record.hangs += 1
                (self.folder / f"hang-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
        record = self.record
        if seconds > record.slowest:
            record.slowest = seconds
            (self.folder / "slowest").write_bytes(data)
        record.inputs += 1
        if record.inputs % _EVERY == 0 or record.inputs >= self.runs:
            self.write()

    def again(self, data: bytes) -> float:
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # it was counted the first time
            self.call(data)
        return time.perf_counter() - start

    def crash(self, data: bytes, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]!r}"
        key = where.partition(": ")[0]
        if key not in self.record.crashes:
            path = self.folder / f"crash-{hashlib.sha1(data).hexdigest()}"
            path.write_bytes(data)
            self.record.crashes[key] = f"{path}: {where}"
        self.record.crashed += 1

    def write(self) -> None:
        record = self.record
        record.seconds, record.peak = time.perf_counter() - self.started, _peak()
        record.outcomes = dict(self.outcomes)
        left = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("flexlora-")]
        record.left = len(left) + max(0, len(os.listdir("/proc/self/fd")) - self.open - 8)
        record.save(self.folder / "record.json")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- around them ---


def task(target: str, number: int, runs: int, folder: Path) -> list[Record]:
    """Run one share of a target, in new processes where one dies (which counts as a crash)."""
    records: list[Record] = []
    for attempt in range(_RESTARTS):
        own = folder / f"{target}-{number}-{attempt}"
        own.mkdir(parents=True)
        left = runs - sum(record.inputs for record in records)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--work", target, "--inputs", str(left)]
        command += ["--seed", str(1 + 1000 * number + attempt), "--folder", str(own)]
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as spool:
            environment = os.environ | {"TMPDIR": spool, "OMP_NUM_THREADS": "1"}
            with open(own / "log", "wb") as log:
                done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        text = (own / "log").read_text(errors="replace")
        record = Record(**json.loads((own / "record.json").read_text())) if (own / "record.json").exists() else Record()
        seen = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", text)
        record.edges, record.corpus = map(int, seen[-1]) if seen else (0, 0)
        if done.returncode:
            if not record.inputs and attempt == 0:
                raise SystemExit(f"the fuzzer did not start; {own / 'log'} ends with:\n{text[-2000:]}")
            record.crashed += 1
            record.crashes[f"process ended with {done.returncode}"] = f"{own}: see its log"
        records.append(record)
        if not done.returncode:
            break
    return records


def total(records: list[Record]) -> Record:
    """Sums of counts and of processor seconds, maxima of the rest."""
    result = Record()
    outcomes: Counter[str] = Counter()
    for record in records:
        outcomes.update(record.outcomes)
        result.crashes |= record.crashes
        for name in ("inputs", "seconds", "crashed", "hangs", "left"):
            setattr(result, name, getattr(result, name) + getattr(record, name))
        for name in ("slowest", "before", "peak", "edges", "corpus"):
            setattr(result, name, max(getattr(result, name), getattr(record, name)))
    result.outcomes = dict(outcomes.most_common())
    return result


def report(found: dict[str, Record], wall: float, jobs: int, inputs: int, fuzzer: str) -> str:
    from benchmarks.machine import commit, cpu_name

    everything = total(list(found.values()))
    lines = [
        "# Fuzzing of the gate",
        "",
        f"`python -m benchmarks.fuzz --inputs {inputs} --jobs {jobs}`: **{everything.inputs:,} inputs, "
        f"{everything.crashed} crashes, {everything.hangs} hangs** in {wall / 60:.1f} minutes. Slowest input "
        f"{1e3 * everything.slowest:.0f} ms. Peak memory of a process {everything.peak / 1024:.0f} MiB, of which "
        f"{everything.before / 1024:.0f} MiB before the first input (torch, and libFuzzer's instruments). Temporary "
        f"files and descriptors left behind: {everything.left}.",
        "",
        f"Commit {commit()}, {fuzzer}, Python {platform.python_version()}, torch "
        f"{version('torch')}, safetensors {version('safetensors')}, {cpu_name()}. What the targets and the oracle are: "
        "`tests/fuzzing.py`. Inputs in a second are those of one process, with the oracle's own work and everything "
        "else that this machine did meanwhile. Edges: of this package's code, as libFuzzer counts them, the most that "
        "one process of the target reached; corpus: the inputs that it kept for reaching them.",
        "",
        "| target | inputs | inputs/s | edges | corpus | admitted | crashes | hangs | slowest, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target, r in found.items():
        lines.append(
            f"| {target} | {r.inputs:,} | {r.inputs / max(r.seconds, 1e-9):,.0f} | {r.edges:,} | {r.corpus:,} "
            f"| {r.outcomes.get('admitted', 0):,} | {r.crashed} | {r.hangs} | {1e3 * r.slowest:.0f} |"
        )
    lines += ["", "## Outcomes", "", f"| outcome | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name in everything.outcomes:
        lines.append(f"| {name} | {' | '.join(f'{r.outcomes.get(name, 0):,}' for r in found.values())} |")
    if everything.crashes:
        lines += ["", "## Crashes", "", *(f"- {text}" for text in everything.crashes.values())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all, over all targets")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz-data"), help="for crashes, corpora and logs")
    parser.add_argument("--out", type=Path, help="a file for the report, beside printing it")
    parser.add_argument("--work", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.inputs, options.seed, options.folder)
        return 0
    try:
        fuzzer = f"atheris {version('atheris')}"
    except PackageNotFoundError:
        raise SystemExit("atheris is not installed; pip install 'flexlora_fast[fuzz]'") from None
    folder = options.folder / time.strftime("%Y%m%d-%H%M%S")
    tasks = [(target, number) for target, count in SHARES.items() for number in range(count)]
    runs = -(-options.inputs // len(tasks))
    start = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {key: pool.submit(task, *key, runs, folder) for key in tasks}
        done = {key: future.result() for key, future in futures.items()}
    wall = time.perf_counter() - start
    found = {
        target: total([r for key, records in done.items() if key[0] == target for r in records]) for target in SHARES
    }
    text = report(found, wall, options.jobs, options.inputs, fuzzer)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return int(any(record.crashed or record.hangs for record in found.values()))


if __name__ == "__main__":
    sys.exit(main())
