"""A journalled round that is killed, loses power, or finds its disk full, at every call that changes its folder.

``python -m tests.kills WHAT [EVERY]`` runs it, in a process of its own that never had threads, and prints what came out
as JSON. WHAT is one of ``RUNS``; EVERY = 3 takes each third point.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, JournalError, RefusedError
from flexlora_fast.journal import Round
from tests import rounds
from tests.faults import KILLED, Disk, Fault, in_child, points

UPDATE = "global_update.safetensors"
LAYERS = (rounds.Layer("up", 9, 5), rounds.Layer("down", 4, 7))
# Op by op: name, upload, weight. "drop" takes a client out; NaN is refused.
OPS = ("a", "nan", "c1", "gone", "c2", "a again", "drop gone", "d", "finish")
WEIGHTS = {"a": 2.0, "c": 3.0, "d": 1.5}


def client(name: str, rank: int, seed: int = 0) -> rounds.Client:
    made = rounds.client(name, LAYERS, rank=rank, alpha=2 * rank, seed=seed)
    return made.but(extras={"head.weight": torch.full((2, 3), seed + 1.0)})


def policy() -> ff.RoundPolicy:
    return ff.RoundPolicy.from_adapter(client("ref", 4).adapter(), ranks=range(1, 5), scale="constant", max_weight=10)


def uploads() -> dict[str, bytes]:
    """The weights that the ops send."""
    from safetensors.torch import save

    made = {"a": client("a", 3), "c1": client("c", 2), "c2": client("c", 4, seed=1), "d": client("d", 1)}
    made |= {"gone": client("gone", 2, seed=5)}
    found = {key: save({k: v.contiguous() for k, v in c.state_dict().items()}) for key, c in made.items()}
    bad = client("nan", 2).state_dict()
    next(iter(bad.values()))[0, 0] = float("nan")
    return found | {"nan": save({k: v.contiguous() for k, v in bad.items()})}


SENT = uploads()


def begin(folder: Path) -> Round:
    return Round.open(folder, policy=policy(), rank=6, seed=3, duplicate="replace", min_clients=3, progress=False)


def do(round_: Round, op: str) -> None:
    """One op; what it must come to is checked."""
    if op == "finish":
        round_.finish()
    elif op == "nan":
        try:
            round_.add(SENT["nan"], client="nan")
        except RefusedError as error:
            assert error.code == "not-finite", error
        else:
            raise AssertionError("NaN was accepted")
    elif op == "drop gone":
        try:
            round_.drop("gone", "tested")
        except AdapterError:  # it was dropped, and nobody heard of it
            assert "gone" not in round_.clients
    else:
        key = op.removesuffix(" again")
        name = key.rstrip("12")
        receipt = round_.add(SENT[key], WEIGHTS.get(name, 1.0), client=name)
        assert receipt.client == name and (not op.endswith(" again") or not receipt.new)


def script(folder: Path, acknowledged: Path, ops: tuple[str, ...] = OPS) -> None:
    """The round; each op is noted once it has returned."""
    with begin(folder) as round_:
        for op in ops:
            do(round_, op)
            with open(acknowledged, "a") as file:
                file.write(op + "\n")


def rest(folder: Path, acknowledged: Path) -> None:
    """What clients do after a crash: whoever heard nothing sends again, and one who did as well."""
    heard = acknowledged.read_text().split("\n")[:-1] if acknowledged.exists() else []
    with begin(folder) as round_:
        if "a" in heard:
            assert "a" in round_.clients, "an acknowledged upload is lost"
            assert not round_.add(SENT["a"], WEIGHTS["a"], client="a").new
        if "c2" in heard:
            assert "c" in round_.clients
        for op in OPS[len(heard) :]:
            do(round_, op)
            with open(acknowledged, "a") as file:
                file.write(op + "\n")
        round_.finish()


def undamaged(folder: Path) -> None:
    """Nobody has to send again for the round to go on: what was not acknowledged is no damage."""
    if (folder / "round.json").exists():
        assert not ff.journal.examine(folder).damage, ff.journal.examine(folder).damage


def outcome(folder: Path) -> tuple[bytes, list[str], list[tuple[str, str]]]:
    """What must come out the same: the update's bytes, who is in it, who is not."""
    status = ff.journal.examine(folder)
    assert status.state == "finished", status
    left = {path.name for path in folder.iterdir()}
    assert left == {"round.json", "manifest.jsonl", "lock", "spool", "quarantine", UPDATE}, left
    assert len(list((folder / "spool").iterdir())) == len(status.clients)
    assert not [path for path in (folder / "quarantine").iterdir() if path.name.startswith(".")]
    return (
        (folder / UPDATE).read_bytes(),
        [entry.client for entry in status.clients],
        [(refusal.client, refusal.code) for refusal in status.refused],
    )


class Trial:
    """A folder for each try, and what the undisturbed round gave."""

    def __init__(self, base: Path) -> None:
        self.base, self.tries = base, 0
        script(base / "warm", base / "warm.acks")  # what is done first in a process takes long; children inherit it
        self.trace = self._traced(script)
        self.expected = outcome(self.folder)
        assert self.expected[1] == ["a", "c", "d"]
        assert self.expected[2] == [("gone", "dropped"), ("nan", "not-finite")]

    @property
    def folder(self) -> Path:
        return self.base / f"r{self.tries}" / "0007"

    @property
    def acks(self) -> Path:
        return self.base / f"r{self.tries}.acks"

    def fresh(self) -> tuple[Path, Path]:
        shutil.rmtree(self.base / f"r{self.tries}", ignore_errors=True)
        self.tries += 1
        self.folder.parent.mkdir()
        return self.folder, self.acks

    def _traced(self, work: Callable[[Path, Path], None]) -> list[tuple[str, str]]:
        folder, acks = self.fresh()
        return self.traced(lambda: work(folder, acks))

    def traced(self, work: Callable[[], None]) -> list[tuple[str, str]]:
        """The calls that ``work`` makes, in a child."""
        out = self.base / "trace"

        def run() -> None:
            with Disk(self.folder) as disk:
                work()
            out.write_text(json.dumps(disk.trace))

        assert in_child(run) == 0
        return [(name, path) for name, path in json.loads(out.read_text())]

    def killed(self, fault: Fault, work: Callable[[], None]) -> None:
        def run() -> None:
            with Disk(self.folder, fault):
                work()

        status = in_child(run)
        assert status == KILLED, f"{fault}: {status}"

    def check(self, fault: Fault) -> None:
        undamaged(self.folder)
        assert in_child(lambda: rest(self.folder, self.acks)) == 0, f"{fault}: cannot be taken up"
        assert outcome(self.folder) == self.expected, f"{fault}: another result"


def crashes(trial: Trial, kind: str, every: int) -> Iterator[str]:
    """The whole round, killed once."""
    for fault in list(points(trial.trace, kind))[::every]:
        folder, acks = trial.fresh()
        trial.killed(fault, lambda folder=folder, acks=acks: script(folder, acks))
        trial.check(fault)
        yield trial.trace[fault.step][0]


def again(trial: Trial, kind: str, every: int) -> Iterator[str]:
    """A round that was killed in the middle of an upload, of a line, or just before its last line, and killed again
    while it was taken up.
    """
    trace = trial.trace
    lines = [i for i, (name, path) in enumerate(trace) if name == "write" and path == "manifest.jsonl"]
    copies = [i for i, (name, path) in enumerate(trace) if name == "write" and path.startswith("spool")]
    last = [i for i, (name, path) in enumerate(trace) if name == "replace" and path.startswith(f".{UPDATE}")]
    for first in (Fault(copies[2], half=True), Fault(lines[4], half=True), Fault(last[-1] + 1)):
        folder, acks = trial.fresh()
        trial.killed(first, lambda folder=folder, acks=acks: script(folder, acks))
        shutil.copytree(folder.parent, trial.base / "crashed", symlinks=True)
        shutil.copyfile(acks, trial.base / "crashed.acks")
        resumed = trial.traced(lambda folder=folder, acks=acks: rest(folder, acks))
        for fault in list(points(resumed, kind))[::every]:
            folder, acks = trial.fresh()
            shutil.copytree(trial.base / "crashed", folder.parent, dirs_exist_ok=True, symlinks=True)
            shutil.copyfile(trial.base / "crashed.acks", acks)
            trial.killed(fault, lambda folder=folder, acks=acks: rest(folder, acks))
            trial.check(fault)
            yield resumed[fault.step][0]
        shutil.rmtree(trial.base / "crashed")


def refused_by_the_disk(trial: Trial, kind: str, every: int) -> Iterator[str]:
    """A call that fails, alone or with all that follow until somebody makes room; then the client sends again."""
    both = [fault for lasting in (False, True) for fault in points(trial.trace, kind, lasting)]
    for fault in both[::every]:
        folder, acks = trial.fresh()
        assert in_child(lambda folder=folder, acks=acks, fault=fault: insisting(folder, acks, fault)) == 0, fault
        assert outcome(folder) == trial.expected, f"{fault}: another result"
        yield trial.trace[fault.step][0]


def insisting(folder: Path, acks: Path, fault: Fault) -> None:
    """Every op until it is done, in one process; nothing but a ``JournalError`` may come of the disk."""
    with Disk(folder, fault) as disk:
        round_ = _insist(lambda: begin(folder), disk)
        for op in OPS:
            before = round_.clients if not disk.fired else None
            _insist(lambda op=op: do(round_, op), disk)
            assert before is None or set(before) - {"gone"} <= set(round_.clients)
            with open(acks, "a") as file:
                file.write(op + "\n")
        assert disk.fired
        round_.close()
    rest(folder, acks)


def _insist(work: Callable[[], Any], disk: Disk) -> Any:
    for _ in range(2):
        try:
            return work()
        except JournalError as error:
            assert disk.fired and error.message, error
            disk.mended = True
            undamaged(Path(disk.root))
    return work()


RUNS: dict[str, tuple[Callable[[Trial, str, int], Iterator[str]], str]] = {
    "kill": (crashes, "kill"),
    "kill again": (again, "kill"),
    "power": (crashes, "power"),
    "power, some of it written": (crashes, "power:1"),
    "full": (refused_by_the_disk, "ENOSPC"),
    "broken": (refused_by_the_disk, "EIO"),
}


def run(what: str, every: int = 1) -> dict[str, Any]:
    """One of ``RUNS``: how many points were tried, by call, and how many calls the undisturbed round makes. All gave
    the same bytes.
    """
    torch.set_num_threads(1)
    memory = "/dev/shm"  # what is flushed is followed in ``faults``: a real disk would only take its time
    base = Path(tempfile.mkdtemp(prefix="kills-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        trial = Trial(base)
        work, kind = RUNS[what]
        calls = Counter(work(trial, kind, every))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return {"what": what, "points": calls.total(), "calls": dict(calls), "trace": len(trial.trace)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)))
    sys.stdout.flush()
    os._exit(0)
