"""Ways to make a journalled round lose, forget or hold on to something: each was found by trying."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import incremental
from flexlora_fast.errors import JournalError, OptionError, RefusedError, WeightError
from flexlora_fast.gate import Reason, intake
from flexlora_fast.incremental import GramTable
from flexlora_fast.journal import Round, examine
from tests import kills, rounds
from tests.kills import SENT, begin, policy


def test_a_round_that_could_not_be_opened_is_free(tmp_path: Path) -> None:
    """Its error may be kept, as a future or an interactive session does, and with it the frames it came through."""
    begin(tmp_path / "r").close()
    for how in ({"rank": 99}, {"policy": ff.RoundPolicy.from_config({"r": 2}, {"fc": (4, 3)}, ranks=(2,))}):
        with pytest.raises(OptionError) as kept:
            Round.open(tmp_path / "r", **how)
        Round.open(tmp_path / "r").close()
        assert kept.tb is not None
    real, kept_errors = os.write, []
    with mock.patch.object(os, "write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        try:
            Round.open(tmp_path / "r")
        except JournalError as error:
            kept_errors.append(error)
    assert os.write is real and len(kept_errors) == 1
    Round.open(tmp_path / "r").close()


def test_closed_is_free_whoever_has_inherited_the_lock(tmp_path: Path) -> None:
    """A worker that was forked meanwhile has the same open file, and lives on."""
    round_ = begin(tmp_path / "r")
    assert round_._held is not None
    with subprocess.Popen(["sleep", "60"], pass_fds=[round_._held.descriptor]) as worker:
        round_.close()
        Round.open(tmp_path / "r").close()
        worker.kill()


def test_the_place_of_a_lost_upload_is_kept(tmp_path: Path) -> None:
    size = len(SENT["a"])
    for quota in ({"max_clients": 2}, {"max_round_bytes": 2 * size + 10}):
        folder, code = tmp_path / next(iter(quota)), "round-full" if "max_clients" in quota else "round-bytes"
        of = ff.RoundPolicy.from_json(policy().to_json() | quota)
        with Round.open(folder, policy=of) as round_:
            for name in "ab":
                round_.add(SENT["a"], client=name)
        (folder / "spool" / "000002.safetensors").unlink()
        with Round.open(folder) as round_:
            with pytest.raises(RefusedError) as caught:
                round_.add(SENT["a"], client="c")
            assert caught.value.code == code
            assert round_.add(SENT["a"], client="b").new and round_.clients == ["a", "b"]
            with pytest.raises(RefusedError):
                round_.add(SENT["a"], client="c")
            round_.drop("b", "tested")
            assert round_.add(SENT["a"], client="c").new
        max((folder / "spool").iterdir()).unlink()
        with Round.open(folder) as round_:
            assert [d.client for d in round_.status().damage] == ["c"]
            round_.drop("c", "tested")  # and with it goes its place
            assert round_.add(SENT["a"], client="d").new


def test_nothing_is_begun_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="is no folder"):
        begin(tmp_path / "r")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_could_not_be_read_again_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="seed"):
        Round.open(tmp_path / "r", policy=policy(), seed=10**40)
    odd = ff.RoundPolicy.from_config({"r": 2, "lora_dropout": float("nan")}, {"fc": (4, 3)}, ranks=(2,))
    with pytest.raises(OptionError, match="cannot be written down"):
        Round.open(tmp_path / "r", policy=odd)
    assert not any(tmp_path.iterdir())


def test_every_folder_that_is_made_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, real = set[str](), os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    begin(tmp_path / "of" / "many" / "rounds").close()
    wanted = {tmp_path, tmp_path / "of", tmp_path / "of" / "many", tmp_path / "of" / "many" / "rounds"}
    assert {str(path) for path in wanted} <= flushed


def test_a_process_that_goes_elsewhere_writes_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with begin(Path("r")) as round_:
        round_.add(SENT["a"], client="a")
        monkeypatch.chdir(tmp_path / "other")
        round_.add(SENT["c1"], client="c")
        assert round_.status().state == "open"
    assert [entry.client for entry in examine(tmp_path / "r").clients] == ["a", "c"]
    assert not any((tmp_path / "other").iterdir())


@pytest.mark.parametrize("first", [100, 4096])
@pytest.mark.parametrize("size", [4, 900, 9000])
def test_a_header_that_is_none_leaves_its_first_bytes(size: int, first: int, tmp_path: Path) -> None:
    junk = ((16).to_bytes(8, "little") + b"this is no json." + bytes(range(256)) * 40)[:size]
    of = ff.RoundPolicy.from_json(policy().to_json())
    with Round.open(tmp_path / "r", policy=of, quarantine=ff.journal.Quarantine(first=first)) as round_:
        with pytest.raises(RefusedError):
            round_.add(junk, client="j")
        (path,) = (tmp_path / "r" / "quarantine").iterdir()
        assert base64.b64decode(json.loads(path.read_text())["first"]) == junk[: min(first, size)]


def test_refusals_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for names in ("xyz", "zxy"):
        with Round.open(tmp_path / names, policy=policy(), rank=6, progress=False) as round_:
            for name in names:
                with pytest.raises(RefusedError):
                    round_.add(SENT["nan"], client=name)
                round_.add(SENT["gone"], client=f"gone {name}")
                round_.drop(f"gone {name}", "tested")
            round_.add(SENT["a"], client="a")
            round_.finish()
        found.add((tmp_path / names / kills.UPDATE).read_bytes())
        assert [x.client for x in examine(tmp_path / names).refused] == ["gone x", "gone y", "gone z", *"xyz"]
    assert len(found) == 1


# -- what this machine is short of is no client's doing ---


def short(*names: str) -> Any:
    """``os.open`` in a process that has no descriptor left for files of these names."""
    real = os.open

    def refuse(path: Any, *args: Any, **kw: Any) -> int:
        if isinstance(path, str | os.PathLike) and os.path.basename(path) in names:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path))
        return real(path, *args, **kw)

    return mock.patch.object(os, "open", refuse)


def test_no_descriptor_left_is_not_a_file_that_is_not_there(tmp_path: Path) -> None:
    kills.client("a", 3).adapter().save(tmp_path / "a")
    with begin(tmp_path / "r") as round_:
        for name in ("adapter_model.safetensors", "adapter_config.json", "a", "000001.safetensors"):
            with short(name), pytest.raises(JournalError, match=r"Too many open files\); let .* have more"):
                round_.add(tmp_path / "a", client="a")
        assert not round_.status().refused and not any((tmp_path / "r" / "spool").iterdir())
        round_.add(tmp_path / "a", client="a")
    agg = ff.Aggregator(policy=policy())
    with short("a"), pytest.raises(OSError, match="Too many open files"):
        agg.add(tmp_path / "a", client="a")
    assert not agg.refused


def test_a_copy_that_cannot_be_opened_for_want_of_descriptors_has_not_changed(tmp_path: Path) -> None:
    agg = ff.Aggregator(policy=policy(), spool=tmp_path)
    lacking = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    error = ff.errors.AdapterError("cannot be read")
    error.__cause__ = lacking
    with mock.patch.object(intake, "TensorFile", side_effect=error), pytest.raises(OSError, match="Too many"):
        agg.add(SENT["a"], client="a")
    assert not agg.refused and not any(tmp_path.iterdir())


def test_no_descriptor_left_does_not_make_uploads_lost(tmp_path: Path) -> None:
    with begin(tmp_path / "r") as round_:
        round_.add(SENT["a"], client="a")
    with short("000001.safetensors"):
        for look in (lambda: Round.open(tmp_path / "r"), lambda: examine(tmp_path / "r")):
            with pytest.raises(JournalError, match="Too many open files"):
                look()
    with Round.open(tmp_path / "r") as round_:
        none = mock.patch.object(ff.tensorfile, "open", side_effect=OSError(errno.EMFILE, "Too many"), create=True)
        with none, pytest.raises(JournalError, match="Too many"):
            round_.add(SENT["c1"], client="c")
        assert round_.status().state == "open"
        round_.add(SENT["c1"], client="c")
        assert round_.clients == ["a", "c"]


# -- interrupts ---

STRIDE = 7
PARTS = ("/journal/", "/gate/entrance.py", "/gate/intake.py", "/aggregator.py", "/files.py")


class Interrupt:
    """KeyboardInterrupt before the ``n``-th line of the parts that write, as a Ctrl-C or a handler of SIGTERM comes."""

    def __init__(self, n: int) -> None:
        self.left, self.fired = n, False

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if any(part in frame.f_code.co_filename for part in PARTS) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self.fired:
            self.left -= 1
            if self.left < 0:
                self.fired = True
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed") / "r"
    with begin(folder) as round_:
        for op in kills.OPS:
            kills.do(round_, op)
    return kills.outcome(folder)


@pytest.mark.parametrize("target", ["c2", "nan", "drop gone", "finish"])
def test_interrupts_anywhere_cost_nothing(target: str, undisturbed: Any, tmp_path: Path) -> None:
    """The round that was interrupted goes on in the same process; lines at a stride."""
    n, fired = 0, True
    while fired:
        folder = tmp_path / str(n)
        with begin(folder) as round_:
            for op in kills.OPS:
                if op == target:
                    with Interrupt(n) as interrupt, contextlib.suppress(KeyboardInterrupt):
                        kills.do(round_, op)
                    fired = interrupt.fired
                kills.do(round_, op)
        begin(folder).close()  # clears away the file of a client that was dropped, where that was interrupted
        assert kills.outcome(folder) == undisturbed, n
        n += STRIDE
    assert n > 80


# -- what replaced uploads leave behind ---


def test_grams_of_those_that_went_are_let_go_of() -> None:
    layers = [rounds.Layer("fc", 90, 80)]
    adapters = {i: rounds.client(f"c{i}", layers, rank=70, seed=i).adapter() for i in range(6)}
    pairs = {i: (x.factors("fc")[1], x.factors("fc")[0]) for i, x in adapters.items()}
    table, plain = (GramTable(1 << 30, lambda *_: True) for _ in range(2))
    for name, i in (("a", 0), ("b", 1), ("c", 2)):
        table.take(name, adapters[i])
    for i in [3, 4, 5, 3] * 5:  # c is replaced over and over, and b once
        table.forget("c")
        table.take("c", adapters[i])
    table.forget("b")
    table.take("b", adapters[5])
    assert table._layers is not None and len(table._layers["fc"].blocks) <= 6
    assert table._layers["fc"].left.shape[0] <= incremental._GROWTH * 6 * 70
    for name, i in (("c", 3), ("a", 0), ("b", 5)):
        plain.take(name, adapters[i])
    order = [("a", *pairs[0]), ("b", *pairs[5]), ("c", *pairs[3])]
    found, expected = table.of("fc", order), plain.of("fc", order)
    assert found is not None and expected is not None
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for name in "abc":
        table.forget(name)
    assert not table._layers["fc"].blocks and not table._layers["fc"].left.numel()
    table.take("a", adapters[0])
    table.take("b", adapters[1])
    assert table.of("fc", [("a", *pairs[0]), ("b", *pairs[1])]) is not None


def test_taking_one_out_of_many_looks_at_each_skeleton_once(monkeypatch: pytest.MonkeyPatch) -> None:
    agg = ff.Aggregator(policy=policy(), progress=False)
    for i in range(30):
        agg.add(SENT["a" if i % 2 else "d"], client=f"c{i}")
    looked = []
    settle = ff.admission.Admission._settle
    monkeypatch.setattr(
        ff.admission.Admission, "_settle", lambda self, who, skeleton: looked.append(who) or settle(self, who, skeleton)
    )
    agg._take_out("c7")
    assert looked == ["client 'c0'", "client 'c1'"]
    assert "c7" not in agg.clients and len(agg.clients) == 29
    with pytest.raises(ff.errors.IncompatibleAdapterError):
        agg.add(SENT["a"], client="c3")
    agg.add(SENT["a"], client="c7")


# -- the same of rounds without a journal ---


def test_a_copy_that_vanished_costs_its_client_alone(tmp_path: Path) -> None:
    agg = ff.Aggregator(policy=policy(), read="finish", spool=tmp_path, progress=False)
    for name, key in (("a", "a"), ("c", "c1")):
        agg.add(SENT[key], client=name)
        for path in tmp_path.iterdir():
            if name == "a":
                path.unlink()
    with pytest.raises(ff.errors.UnreadableError, match="cannot be read any more") as caught:
        agg.finish()
    assert caught.value.client == "a"
    assert [client.name for client in agg.finish().clients] == ["c"]


def test_who_ran_out_of_memory_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = ff.RoundPolicy.from_json(policy().to_json() | {"max_clients": 1})
    agg = ff.Aggregator(policy=of, spool=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ff.Adapter, "in_memory", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            agg.add(SENT["a"], client="a")
    assert not any(tmp_path.iterdir())
    agg.add(SENT["a"], client="a")


def test_a_number_too_long_to_quote_is_a_bad_weight(tmp_path: Path) -> None:
    agg = ff.Aggregator()
    with pytest.raises(WeightError, match="too long to quote"):
        agg.add(kills.client("a", 2).adapter(), 10**5000, "a")
    with begin(tmp_path / "r") as round_, pytest.raises(WeightError, match="too long to quote"):
        round_.add(SENT["a"], 10**5000, client="a")
    with pytest.raises(RefusedError) as caught:
        policy().admit(SENT["a"], client="a", weight=10**5000)
    assert caught.value.code == Reason.WEIGHT


def test_names_in_client_ranks_are_texts() -> None:
    """A number would be another name once it was stored."""
    rules: Any = {"ranks": (2, 8), "client_ranks": {1: (2,)}}
    with pytest.raises(OptionError, match="client_ranks has 1"):
        ff.RoundPolicy.from_config({"r": 8}, {"fc": (4, 3)}, **rules)
