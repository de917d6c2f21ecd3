"""Journalled rounds that are killed, lose power or find the disk full, at every call that changes their folder
(``kills``); and what a real file system says when it is full, read-only or in use.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexlora_fast.errors import JournalError
from flexlora_fast.journal import Round, examine
from tests import kills
from tests.faults import Disk, Fault
from tests.kills import SENT, begin

# Which of the points ``make test`` takes: all where a process is killed, and each so many-th of the others.
EVERY = {"kill": 1, "kill again": 25, "power": 7, "power, some of it written": 7, "full": 20, "broken": 20}


def tried(what: str, every: int) -> dict[str, Any]:
    """What ``python -m tests.kills`` says: it forks, so that it needs a process without threads."""
    command = [sys.executable, "-m", "tests.kills", what, str(every)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", kills.RUNS)
def test_every_crash_is_survived_with_the_same_bytes(what: str) -> None:
    assert EVERY.keys() == kills.RUNS.keys()
    result = tried(what, EVERY[what])
    if what == "kill":  # before every call, and in the middle of every write
        assert result["points"] == result["trace"] + result["calls"]["write"] // 2 >= 120
        assert {"open", "write", "fsync", "fdatasync", "replace", "unlink", "chmod", "mkdir"} <= result["calls"].keys()
    assert result["points"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what, every in EVERY.items() if every > 1])
def test_every_point_of_the_others(what: str) -> None:
    result = tried(what, 1)
    assert result["points"] >= result["trace"]


# -- real ones ---


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for it: no file may grow beyond so many bytes."""
    code = f"""
import resource, signal
from pathlib import Path
from tests import kills
from flexlora_fast.errors import JournalError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with kills.begin(Path({str(tmp_path / "r")!r})) as round_:
    kills.do(round_, "a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        kills.do(round_, "d")
    except JournalError as error:
        assert error.client == "d" and "make room" in str(error) and "may be sent again" in str(error), error
    else:
        raise SystemExit("it was written")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert round_.clients == ["a"]
    for op in kills.OPS[1:]:
        kills.do(round_, op)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with begin(tmp_path / "undisturbed") as round_:
        for op in kills.OPS:
            kills.do(round_, op)
    assert kills.outcome(tmp_path / "r") == kills.outcome(tmp_path / "undisturbed")


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    begin(tmp_path / "r").close()
    with Disk(tmp_path / "r", Fault(0, "EROFS", lasting=True)), pytest.raises(JournalError, match="make it writable"):
        begin(tmp_path / "r")
    assert examine(tmp_path / "r").state == "open"


HOLDER = """
import sys, time
from pathlib import Path
from tests import kills
round_ = kills.begin(Path(sys.argv[1]))
kills.do(round_, "a")
print("ready", flush=True)
time.sleep(600)
"""


def test_two_processes_do_not_write_one_round_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "r")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(JournalError, match=f"in use by process {other.pid}"):
            begin(tmp_path / "r")
        assert [entry.client for entry in examine(tmp_path / "r").clients] == ["a"]  # reading needs no lock
        other.send_signal(signal.SIGKILL)
    with begin(tmp_path / "r") as round_:
        assert not round_.add(SENT["a"], kills.WEIGHTS["a"], client="a").new
        with pytest.raises(JournalError, match=f"in use by process {os.getpid()}"):
            Round.open(tmp_path / "r")
