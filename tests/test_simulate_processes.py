"""Runs in processes of their own: the same numbers whatever their number, killed and taken up, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexlora_fast.errors import SimulationError
from flexlora_fast.simulate import pool, results, worker
from flexlora_fast.simulate.run import run
from tests.simulations import colours, experiment, numbers  # noqa: F401 - a fixture


def questions(path: Path) -> Path:
    """A file as the TREC questions come in."""
    kinds = {"LOC:city": "Where is {} ?", "HUM:ind": "Who is {} ?", "NUM:date": "When was {} ?"}
    lines = [f"{kind} {text.format(i)}" for i in range(30) for kind, text in kinds.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(tmp_path: Path) -> Path:
    made = tmp_path / "small.toml"
    made.write_text(
        f"""
name = "small"
rounds = 3
task = {{ name = "trec", path = "{questions(tmp_path / "questions.txt")}", test = 20 }}
model = {{ path = "tiny", dtype = "float32" }}
clients = {{ number = 4, partition = "iid" }}
ranks.each = [1, 2]
training = {{ steps = 2, batch = 4, lr = 1e-2 }}
"""
    )
    return made


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flexlora_fast", "simulate", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.usefixtures("colours")
def test_numbers_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        run(experiment(lora__dropout=0.1), tmp_path / str(workers), workers=workers)
    assert numbers(tmp_path / "0") == numbers(tmp_path / "1") == numbers(tmp_path / "2")
    assert (tmp_path / "0/scores.npz").read_bytes() == (tmp_path / "2/scores.npz").read_bytes()


def gone(group: int) -> bool:
    """Whether the last process of the group ends within seconds."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    file = config(tmp_path)
    subprocess.run(command(file, "--out", tmp_path / "whole", "--workers", 0), check=True, timeout=900)
    # In a group of its own, which is there as long as a worker is.
    started = subprocess.Popen(command(file, "--out", tmp_path / "parts", "--workers", 2), start_new_session=True)
    deadline = time.monotonic() + 900
    while not list((tmp_path / "parts").glob("state/work/00002/*/result.json")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    started.kill()
    started.wait()
    assert gone(started.pid)
    assert not (tmp_path / "parts/summary.json").exists()
    again = command(file, "--out", tmp_path / "parts", "--workers", 1, "--resume", "--json")
    told = subprocess.run(again, check=True, timeout=900, capture_output=True, text=True)
    assert json.loads(told.stdout)["rounds"] == 3
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert (tmp_path / "parts/scores.npz").read_bytes() == (tmp_path / "whole/scores.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("colours")
def test_a_worker_that_dies_is_told_and_what_was_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = pool.ProcessPoolExecutor.submit
    count = [0]

    def die(self: pool.ProcessPoolExecutor, function: object, *arguments: object) -> object:
        count[0] += 1
        if function is worker.run and count[0] == 5:  # the second training of round 1
            return submit(self, os._exit, 9)
        return submit(self, function, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pool.ProcessPoolExecutor, "submit", die)
    with pytest.raises(SimulationError, match=r"a worker process died .* --resume goes on"):
        run(experiment(), tmp_path / "parts", workers=1)
    monkeypatch.undo()
    from flexlora_fast.simulate import tasks
    from tests.simulations import Colours

    monkeypatch.setattr(tasks, "task_class", lambda name: Colours)
    run(experiment(), tmp_path / "parts", workers=0, resume=True)
    run(experiment(), tmp_path / "whole", workers=0)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_tells_a_line_a_round_and_writes_a_report(tmp_path: Path) -> None:
    file = config(tmp_path)
    given = command(file, "--method", "fedit", "--seed", 2, "--set", "ranks.everyone=smallest", "--workers", 0)
    told = subprocess.run([*given, "--out", tmp_path / "a"], check=True, timeout=900, capture_output=True, text=True)
    lines = told.stdout.splitlines()
    assert lines[0] == "small: 4 clients (4× r=1), 20 test rows"
    assert [line.split("  ")[0] for line in lines[1:5]] == [f"round {i}" for i in range(4)]
    assert lines[5].startswith("accuracy ") and lines[5].endswith("report.html") and not told.stderr
    assert "<svg" in (tmp_path / "a/report.html").read_text()
    run_ = results.read(tmp_path / "a")
    assert (run_.method, run_.seed, run_.finished) == ("fedit", 2, True)
    again = subprocess.run([*given, "--out", tmp_path / "a"], check=False, timeout=900, capture_output=True, text=True)
    assert again.returncode == 1 and "--resume goes on with it" in again.stderr
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in (results.EXPERIMENT, results.SUMMARY):  # as if of another seed
        told_file = tmp_path / "b" / name
        told_file.write_text(told_file.read_text().replace('"seed": 2', '"seed": 3'))
    page = tmp_path / "both.html"
    both = command("--compare", tmp_path / "a", "--compare", tmp_path / "b", "--out", page)
    subprocess.run(both, check=True, timeout=900)
    assert page.is_file()


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_goes_on(tmp_path: Path) -> None:
    started = subprocess.Popen(
        command(config(tmp_path), "--out", tmp_path / "a", "--set", "rounds=50"),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 900
    while len(results.read(tmp_path / "a").rounds if (tmp_path / "a/clients.json").exists() else ()) < 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 130 and "--resume --out" in said and "Traceback" not in said
