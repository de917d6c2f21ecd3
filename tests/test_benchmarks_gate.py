"""The reports about the gate: what counts as a crash or a hang, and that the tables say what was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import corpus, fuzz, gate
from tests import hostile


def record(folder: Path) -> fuzz.Record:
    return fuzz.Record(**json.loads((folder / "record.json").read_text()))


def test_crashes_and_hangs_are_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG", 0.05)

    def call(data: bytes) -> str:
        if data == b"bad":
            raise ValueError("of the target")
        if data == b"slow" or (data == b"once" and not session.outcomes):
            time.sleep(0.06)
        return "admitted" if data == b"good" else "header"

    session = fuzz.Session(call, 7, tmp_path)
    for data in (b"once", b"good", b"bad", b"bad", b"slow", b"x", b"good"):
        session.one(data)
    found = record(tmp_path)
    assert (found.inputs, found.crashed, len(found.crashes)) == (7, 2, 1)
    assert found.outcomes == {"admitted": 2, "header": 3} and found.slowest >= 0.06
    assert "ValueError at test_benchmarks_gate.py" in next(iter(found.crashes.values()))
    saved = {path.name.split("-")[0]: path.read_bytes() for path in tmp_path.iterdir() if "-" in path.name}
    assert saved["crash"] == b"bad" and found.hangs == 1 and saved["hang"] == b"slow"


def test_a_report_adds_up() -> None:
    one = fuzz.Record(inputs=10, seconds=2.0, outcomes={"header": 10}, slowest=0.1, peak=2048, edges=5)
    two = fuzz.Record(inputs=5, seconds=1.0, outcomes={"admitted": 5}, crashed=1, crashes={"k": "f: k"}, slowest=0.2)
    both = fuzz.total([one, two])
    assert (both.inputs, both.crashed, both.slowest, both.edges) == (15, 1, 0.2, 5)
    text = fuzz.report({"file": one, "bent": two}, 60.0, 2, 15, "atheris 3")
    assert "**15 inputs, 1 crashes, 0 hangs** in 1.0 minutes" in text and "- f: k" in text
    assert "| header | 10 | 0 |" in text and "| admitted | 0 | 5 |" in text


def test_the_table_of_hostile_files() -> None:
    text, right = corpus.report(repeats=1)
    count = len(hostile.WEIGHTS) + len(hostile.CONFIGS) + len(hostile.PATHS)
    assert right and f"{count} files" in text and "expected)" not in text
    assert sum(line.startswith(("| weights |", "| config |", "| path |")) for line in text.splitlines()) == count


def test_the_table_of_honest_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SIZES", {"tiny": (2, 20, 30, 4), "other": (1, 9, 7, 2)})
    titles, rule, *rows = list(gate.lines(repeats=1))
    assert titles.count("|") == rule.count("|") == rows[0].count("|") and [row[:7] for row in rows] == [
        "| tiny ",
        "| other",
    ]
