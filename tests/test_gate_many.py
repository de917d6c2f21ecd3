"""Very many uploads in one round, one in ten hostile: those are refused, the others aggregated, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEBI, KIBI = 1 << 20, 1 << 10
# Resident memory beside the interpreter's: what a round has whatever its size (threads' buffers, torch's code), and
# what a client adds to it. Measured at 10,000: 51 MiB in all with "finish"; 148 MiB with "add", which keeps the
# clients' tensors (2 KiB each) and the Grams of their columns.
FIXED = {"finish": 32 * MEBI, "add": 64 * MEBI}
EACH = {"finish": 8 * KIBI, "add": 20 * KIBI}


@pytest.mark.parametrize("read", ["add", "finish"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_in_ten_is_hostile(count: int, read: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.many", str(count), str(tmp_path), read],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    bad = count // 10
    seconds = {name: round(result[name], 2) for name in ("add", "finish", "telling")}
    print(f"{count} uploads, read={read!r}: seconds {seconds}, memory +{result['growth'] / MEBI:.0f} MiB")
    assert result["wrong"] == [], "(upload, its code, the code expected)"
    assert (result["accepted"], result["refused"], result["copies"]) == (count - bad, bad, count - bad)
    assert result["worst"] < 1e-6, "against float64"
    assert result["growth"] < FIXED[read] + EACH[read] * count
