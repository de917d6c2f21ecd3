"""Flower's own servers and clients on this machine, started by the example's documented commands."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

import flexlora_fast as ff
from examples import demo_data

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".demo-data"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not any(DATA.glob(f"{demo_data.MINILM.name}-*.whl")), reason="no wheels of data: `make demo`"),
]
ROUNDS = 3


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "examples.flower", "--steps", "4", "--rounds", str(ROUNDS), *options]


def losses(output: str) -> dict[int, float]:
    """Test loss on the server, by round (0: before the first)."""
    found = re.findall(r"after round (\d+): \{'test-loss': ([\d.]+)", output)
    return {int(number): float(loss) for number, loss in found}


def check_run(output: str, out: Path) -> None:
    """Three rounds of two honest nodes, of ranks 4 and 16, and a hostile one."""
    by_round = losses(output)
    assert sorted(by_round) == list(range(ROUNDS + 1))
    assert all(by_round[number + 1] < by_round[number] for number in range(ROUNDS)), by_round
    assert output.count("Refused (not-finite): client 'node-") == ROUNDS
    metrics = [line for line in output.splitlines() if "Training: {" in line]
    assert len(metrics) == ROUNDS
    for line in metrics:
        for wanted in (
            "'flexlora-accepted': 2",
            "'flexlora-refused-not-finite': 1",
            "energy-kept-r4",
            "energy-kept-r16",
        ):
            assert wanted in line
    adapter = ff.Adapter.load(out)
    assert adapter.rank(adapter.layers[0]) == 16
    adapter.validate_finite()


@contextlib.contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The example, until the block is left; then it and all that it started are gone."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    below: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.mark.parametrize("how", [[], ["--deploy"]], ids=["simulation", "SuperLink and SuperNodes"])
def test_three_rounds_of_mixed_ranks_with_a_hostile_node(how: list[str], tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    with started(command("--hostile", "--data", str(DATA), "--out", str(out), *how), log) as process:
        assert process.wait(560) == 0, log.read_text()[-3000:]
    check_run(log.read_text(), out)


def server_apps(parent: int) -> list[psutil.Process]:
    """Processes of Flower's ServerApp below one of ours."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone meanwhile, or a zombie
            if any("flwr-serverapp" in part for part in process.cmdline()):
                found.append(process)
    return found


def test_a_server_killed_in_the_middle_of_a_round_goes_on_there(tmp_path: Path) -> None:
    """SIGKILL to the ServerApp once an upload is acknowledged; the second ``flwr run`` asks the other nodes alone."""
    directory, out = tmp_path / "rounds", tmp_path / "out"
    arguments = command("--deploy", "--data", str(DATA), "--directory", str(directory), "--out", str(out), "--again")
    log = tmp_path / "log"
    with started(arguments, log) as process:
        manifest = directory / "round-0002" / "manifest.jsonl"
        end = time.monotonic() + 400
        while not (manifest.is_file() and manifest.read_bytes().endswith(b"\n")):  # a line: one upload acknowledged
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.01)
        killed = server_apps(process.pid)
        for server in killed:
            server.kill()
        assert process.wait(500) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert killed
    assert "has 1 finished rounds; going on after them" in text
    assert re.search(r"configure_train: [123] nodes are in this round already", text)
    assert len(list(directory.glob("round-*/global_update.safetensors"))) == ROUNDS
    by_round = losses(text)
    assert by_round[ROUNDS] < by_round[0]
    assert ff.Adapter.load(out).layers
