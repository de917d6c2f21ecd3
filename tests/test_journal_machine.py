"""A journalled round that is driven at random beside a dictionary that stands for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, DamagedRoundError, EmptyRoundError, QuorumError, RefusedError
from flexlora_fast.journal import Round, examine
from tests.checks import assert_identical
from tests.kills import SENT, UPDATE, policy
from tests.test_journal import sent

NAMES = st.sampled_from("abc")
RANKS = st.integers(1, 3)
WEIGHTS = st.sampled_from([0.5, 2.0])
UPLOADS = {(name, rank): sent(name, rank) for name in "abc" for rank in (1, 2, 3)}


class Journalled(stateful.RuleBasedStateMachine):
    """``there``: rank and weight by client. ``refused``: by client and code."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="machine-"))
        self.folder, self.finished = self.base / "r", False
        self.there: dict[str, tuple[int, float]] = {}
        self.refused: set[tuple[str, str]] = set()
        self.damaged: set[str] = set()

    @stateful.initialize(duplicate=st.sampled_from(["refuse", "replace"]))
    def begin(self, duplicate: str) -> None:
        self.duplicate = duplicate
        self.round = Round.open(
            self.folder, policy=policy(), rank=6, duplicate=duplicate, min_clients=2, progress=False
        )

    def teardown(self) -> None:
        self.round.close()
        shutil.rmtree(self.base)

    @stateful.rule(name=NAMES, rank=RANKS, weight=WEIGHTS)
    def send(self, name: str, rank: int, weight: float) -> None:
        upload, known = UPLOADS[name, rank], self.there.get(name)
        if known == (rank, weight):
            again = name not in self.damaged
            assert self.round.add(upload, weight, client=name).new is not again
        elif self.finished or (known is not None and self.duplicate == "refuse"):
            with pytest.raises(RefusedError) as caught:
                self.round.add(upload, weight, client=name)
            assert caught.value.code == ("closed" if self.finished else "duplicate")
            if not self.finished:
                self.refused.add((name, "duplicate"))
            return
        else:
            assert self.round.add(upload, weight, client=name).new
            self.there[name] = (rank, weight)
            self.refused.discard((name, "dropped"))
        self.damaged.discard(name)

    @stateful.rule(name=NAMES)
    def send_nan(self, name: str) -> None:
        with pytest.raises(RefusedError) as caught:
            self.round.add(SENT["nan"], client=name)
        code = "closed" if self.finished else "not-finite"
        if not self.finished and name in self.there and self.duplicate == "refuse":
            code = "duplicate"
        assert caught.value.code == code
        if not self.finished:
            self.refused.add((name, code))

    @stateful.rule(name=NAMES)
    def drop(self, name: str) -> None:
        if self.finished:
            return
        if name in self.there:
            self.round.drop(name, "tested")
            del self.there[name]
            self.damaged.discard(name)
            self.refused.add((name, "dropped"))
        else:
            with pytest.raises(AdapterError):
                self.round.drop(name, "tested")

    @stateful.rule()
    def reopen(self) -> None:
        self.round.close()
        self.round = Round.open(self.folder, progress=False)

    @stateful.precondition(lambda self: not self.finished)
    @stateful.rule(torn=st.binary(max_size=40))
    def crash(self, torn: bytes) -> None:
        """In the middle of a line."""
        self.round.close()
        with open(self.folder / "manifest.jsonl", "ab") as file:
            file.write(b"0123456789abcdef {" + torn.replace(b"\n", b""))
        self.round = Round.open(self.folder, progress=False)

    @stateful.precondition(lambda self: self.there and not self.finished)
    @stateful.rule(data=st.data(), how=st.sampled_from(["gone", "altered"]), reopened=st.booleans())
    def lose(self, data: st.DataObject, how: str, reopened: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        (entry,) = [entry for entry in examine(self.folder).clients if entry.client == name]
        path = self.folder / "spool" / f"{entry.n:06d}.safetensors"
        if path.exists():
            os.unlink(path)
            if how == "altered":
                path.write_bytes(b"other")
        self.damaged.add(name)
        if reopened:
            self.reopen()

    @stateful.rule()
    def finish(self) -> None:
        if self.damaged:
            with pytest.raises(DamagedRoundError):
                self.round.finish()
        elif len(self.there) < 2 and not self.finished:
            with pytest.raises(QuorumError if self.there else EmptyRoundError):
                self.round.finish()
        else:
            update, self.finished = self.round.finish(), True
            plain = ff.Aggregator(rank=6, policy=policy(), progress=False)
            for name, (rank, weight) in self.there.items():
                plain.add(UPLOADS[name, rank], weight, client=name)
            assert_identical(update, plain.finish())
            assert {(x.client, x.code) for x in update.refused} == self.refused

    @stateful.invariant()
    def told(self) -> None:
        if not self.folder.exists():
            return
        status = examine(self.folder)
        assert {x.client: x.weight for x in status.clients} == {n: w for n, (_, w) in self.there.items()}
        assert {(x.client, x.code) for x in status.refused} == self.refused
        assert {x.client for x in status.damage} == self.damaged
        assert status.state == ("damaged" if self.damaged else "finished" if self.finished else "open")
        assert (self.folder / UPDATE).exists() == self.finished


TestJournalled = Journalled.TestCase
TestJournalled.settings = hypothesis.settings(max_examples=40, stateful_step_count=25, deadline=None)
