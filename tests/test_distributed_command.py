"""The command line under torchrun, as users start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from flexlora_fast.distributed import command as joined
from tests import command


def torchrun(ranks, *arguments, **environment):
    """The command on so many ranks."""
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "flexlora_fast"]
    return subprocess.run(
        [*call, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=120,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in it but what tells the time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix == ".safetensors"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "global" not in path.name}


def test_two_ranks_write_what_one_process_writes(tmp_path):
    """A client that the second rank finds bad, in its layers, is refused on both; only the first speaks."""
    clients = command.three_clients(tmp_path / "clients")
    command.adapter(4, 3, bad=True).save(clients / "dora")
    one = command.start("aggregate", clients, "--out", tmp_path / "one")
    two = torchrun(2, "aggregate", clients, "--out", tmp_path / "two")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout == one.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert "1 refused" in two.stdout and "Traceback" not in two.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients", "one", "two"]


@pytest.mark.slow
def test_what_cannot_be_done_is_said_once(tmp_path):
    clients = command.three_clients(tmp_path / "clients")
    command.adapter(4, 3, bad=True).save(clients / "dora")
    strict = torchrun(2, "aggregate", clients, "--strict", "--out", tmp_path / "out")
    assert strict.returncode == 1
    assert strict.stderr.count("--strict was asked for; nothing was written") == 1
    assert strict.stderr.count("exitcode  : 1") == 2  # torchrun's own account of both ranks
    usage = torchrun(2, "aggregate", clients, "--ranks", "x", "--out", tmp_path / "out")
    assert usage.returncode == 1 and usage.stderr.count("--ranks has 'x'") == 1  # torchrun's own code
    assert usage.stderr.count("exitcode  : 2") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_command(tmp_path, victim):
    """kill -9 while it works: torchrun ends, and there is no output. (Of the first rank, a hidden folder stays.)"""
    clients = command.three_clients(tmp_path / "clients")
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "suicide.py")]
    (tmp_path / "suicide.py").write_text(
        "import os, signal, sys\n"
        "from flexlora_fast import work\n"
        "from flexlora_fast.cli import main\n"
        f"if os.environ['RANK'] == '{victim}':\n"
        "    work.Work.solve_layer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.argv = ['flexlora-fast', 'aggregate', {str(clients)!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    start = time.monotonic()
    ended = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and time.monotonic() - start < 60
    assert f"exitcode  : -{signal.SIGKILL.value}" in ended.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["clients", "suicide.py"]


def test_one_process_is_not_several(monkeypatch):
    """Variables of one rank, or only some of them, are those of something else."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert not joined.launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert joined.launched()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(typer.BadParameter, match=r"WORLD_SIZE is 'two' in the environment.*unset RANK, WORLD_SIZE"):
        joined.launched()
    monkeypatch.delenv("MASTER_ADDR")
    assert not joined.launched()
