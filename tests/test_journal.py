"""A journalled round: what it acknowledges, what comes out, what it turns away, and what it says of damage."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast.errors import (
    AdapterError,
    DamagedRoundError,
    EmptyRoundError,
    JournalError,
    OptionError,
    QuorumError,
    RefusedError,
    WeightError,
)
from flexlora_fast.incremental import GramTable
from flexlora_fast.journal import Quarantine, Round, examine
from tests import hostile, rounds
from tests.checks import assert_identical
from tests.kills import SENT, client, policy

UPDATE = "global_update.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """Rounds that were left open are not left to the tests behind these."""
    yield
    gc.collect()


def opened(folder: Path, **options: Any) -> Round:
    return Round.open(folder, policy=policy(), **{"rank": 6, "progress": False, **options})


def sent(name: str, rank: int = 2, seed: int = 0) -> bytes:
    return save({k: v.contiguous() for k, v in client(name, rank, seed).state_dict().items()})


def filled(folder: Path, names: str = "abc", **options: Any) -> Round:
    round_ = opened(folder, **options)
    for i, name in enumerate(names):
        round_.add(sent(name, rank=1 + i % 4), 1.0 + i, client=name)
    return round_


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a round's folder but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def spooled(folder: Path, name: str) -> Path:
    """The file of a client's upload."""
    (entry,) = [entry for entry in examine(folder).clients if entry.client == name]
    return folder / "spool" / f"{entry.n:06d}.safetensors"


# -- what comes out ---


@pytest.mark.parametrize("model", ["linear", "mixed", "weird"])
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_it_is_what_an_aggregator_gives_taken_up_or_not(model: str, dtype: str, tmp_path: Path) -> None:
    """Every way through: in one go, reopened before every call, other order, other memory, read twice."""
    of = ff.RoundPolicy.from_adapter(
        rounds.client("ref", model).adapter(), ranks=range(1, 9), scale="constant", max_weight=10
    )
    clients = [
        rounds.client(f"c{i}", model, rank=r, alpha=2 * r, weight=w, dtype=d)
        for i, (r, w, d) in enumerate(zip((2, 1, 4, 3), (3.0, 1.0, 2.5, 0.0), rounds.DTYPES[dtype] * 4, strict=False))
    ]
    plain = ff.Aggregator(rank=5, policy=of, progress=False)
    sends = {c.name: save({k: v.contiguous() for k, v in c.state_dict().items()}) for c in clients}
    for c in clients:
        plain.add(sends[c.name], c.weight, client=c.name)
    expected, found = plain.finish(), set()
    ways: list[dict[str, Any]] = [{}, {"read": "finish"}, {"memory_limit": "400KB"}]
    for i, way in enumerate(ways):
        for again in (False, True):
            folder, order = tmp_path / f"{i}{again}", clients[::-1] if again else clients
            round_ = Round.open(folder, policy=of, rank=5, progress=False, **way)
            for c in order:
                if again:
                    round_.close()
                    round_ = Round.open(folder, progress=False, **way)
                round_.add(sends[c.name], c.weight, client=c.name)
            update = round_.finish()
            assert_identical(update, expected)
            assert update.clients == expected.clients and "layers" in update.seconds
            found.add((folder / UPDATE).read_bytes())
            round_.close()
    assert len(found) == 1
    assert ff.GlobalUpdate.load(tmp_path / "0False" / UPDATE).seconds == {}


@pytest.mark.parametrize("defence", ["clip", "multi-krum:byzantine=1", "median"])
def test_with_a_defence_too(defence: str, tmp_path: Path) -> None:
    found = set()
    for again in (False, True):
        folder = tmp_path / str(again)
        round_ = filled(folder, "abcdefg", defence=defence)
        if again:
            round_.close()
            round_ = Round.open(folder, progress=False, read="finish")
        with pytest.warns(UserWarning) if defence != "median" else _nothing():
            update = round_.finish()
        assert update.defence == defence and bool(update.verdicts) == (defence != "median")
        found.add((folder / UPDATE).read_bytes())
    assert len(found) == 1


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_folders_files_bytes_and_adapters_are_taken(tmp_path: Path) -> None:
    for name in "abcd":
        client(name, 2).adapter().save(tmp_path / name)
    with opened(tmp_path / "r") as round_:
        folder = round_.add(tmp_path / "a", client="a")
        file = round_.add(tmp_path / "b" / "adapter_model.safetensors", client="b")
        content = (tmp_path / "c" / "adapter_model.safetensors").read_bytes()
        config = (tmp_path / "c" / "adapter_config.json").read_bytes()
        data = round_.add(content, client="c", config=config)
        made = round_.add(client("d", 2).adapter(), client="d")
        assert data.digest == hashlib.sha256(content).hexdigest() and data.bytes == len(content)
        assert all(receipt.new for receipt in (folder, file, data, made))
        assert not round_.add(client("d", 2).adapter(), client="d").new
        assert not round_.add(tmp_path / "a", client="a").new
        # the config is part of an upload, and so is the weight
        for what in ({}, {"config": config + b" "}, {"config": config, "weight": 0.5}):
            with pytest.raises(RefusedError) as caught:
                round_.add(content, client="c", **what)
            assert caught.value.code == "duplicate"
        assert round_.clients == ["a", "b", "c", "d"] and round_.finish().layers == ["down", "up"]


def test_asked_again_it_is_the_same_file_and_late_ones_are_told(tmp_path: Path) -> None:
    round_ = filled(tmp_path / "r")
    first, before = round_.finish(), files(tmp_path / "r")
    again = round_.finish()
    assert_identical(first, again)
    assert again.seconds == first.seconds
    receipt = round_.add(sent("a", 1), 1.0, client="a")
    assert not receipt.new
    for name, upload in (("z", sent("z")), ("a", sent("a", 3))):
        with pytest.raises(RefusedError, match="finished") as caught:
            round_.add(upload, client=name)
        assert caught.value.code == "closed" and caught.value.client == name
    with pytest.raises(OptionError, match="is finished"):
        round_.drop("a", "too late")
    round_.close()
    with Round.open(tmp_path / "r") as taken_up:
        assert_identical(taken_up.finish(), first)
    assert files(tmp_path / "r") == before


def test_a_quorum_is_waited_for(tmp_path: Path) -> None:
    with opened(tmp_path / "r", min_clients=2, min_weight=4.0) as round_:
        with pytest.raises(EmptyRoundError):
            round_.finish()
        round_.add(sent("a"), 9.0, client="a")
        round_.add(sent("none"), 0.0, client="none")
        with pytest.raises(QuorumError, match="1 clients of weight 9"):  # weight 0 equals absent
            round_.finish()
        round_.add(sent("b"), 1.0, client="b")
        assert len(round_.finish().clients) == 2
    agg = ff.Aggregator(min_weight=3.0)
    agg.add(client("a", 2).adapter(), 2.0, client="a")
    with pytest.raises(QuorumError) as caught:
        agg.finish()
    assert caught.value.code == "quorum"
    agg.add(client("b", 2).adapter(), 1.0, client="b")
    assert agg.finish().layers
    for wrong in ({"min_clients": 0}, {"min_clients": True}, {"min_weight": -1.0}, {"min_weight": float("nan")}):
        with pytest.raises(OptionError):
            ff.Aggregator(**wrong)


# -- again and again ---


def test_nothing_is_written_for_what_is_there(tmp_path: Path) -> None:
    round_ = filled(tmp_path / "r")
    before = files(tmp_path / "r")
    for _ in range(3):
        assert not round_.add(sent("b", 2), 2.0, client="b").new
    assert files(tmp_path / "r") == before


@pytest.mark.parametrize("reopened", [False, True])
def test_another_upload_is_refused_or_takes_the_place(reopened: bool, tmp_path: Path) -> None:
    with filled(tmp_path / "refuse") as round_:
        with pytest.raises(RefusedError, match="sent another upload before") as caught:
            round_.add(sent("b", 4), 2.0, client="b")
        assert caught.value.code == "duplicate"
        update = round_.finish()
        assert [(x.client, x.code) for x in update.refused] == [("b", "duplicate")]
    round_ = filled(tmp_path / "replace", duplicate="replace")
    old = spooled(tmp_path / "replace", "b")
    if reopened:
        round_.close()
        round_ = Round.open(tmp_path / "replace")
    with pytest.raises(RefusedError):  # a bad one does not take the place of a good one
        round_.add(SENT["nan"], 2.0, client="b")
    assert round_.add(sent("b", 4), 5.0, client="b").new
    assert not old.exists() and not round_.add(sent("b", 4), 5.0, client="b").new
    plain = opened(tmp_path / "plain")
    for name, rank, weight in (("a", 1, 1.0), ("b", 4, 5.0), ("c", 3, 3.0)):
        plain.add(sent(name, rank), weight, client=name)
    assert_identical(round_.finish(), plain.finish())


def test_grams_of_a_client_that_went_are_not_taken_for_those_of_the_next_of_its_name() -> None:
    layers = [rounds.Layer("fc", 90, 80)]
    one, two, other = (rounds.client(n, layers, rank=70, seed=i).adapter() for i, n in enumerate("aba"))
    table = GramTable(1 << 20, lambda *_: True)
    for name, adapter in (("a", one), ("b", two)):
        table.take(name, adapter)
    pairs = [(n, x.factors("fc")[1], x.factors("fc")[0]) for n, x in (("a", one), ("b", two))]
    assert table.of("fc", pairs) is not None
    table.forget("a")
    stored = [("a", other.factors("fc")[1], other.factors("fc")[0]), pairs[1]]
    assert table.of("fc", stored) is None and table.of("fc", pairs[1:]) is not None


def test_a_full_round_is_still_full_when_it_is_taken_up(tmp_path: Path) -> None:
    of = ff.RoundPolicy.from_adapter(
        client("ref", 4).adapter(), ranks=range(1, 5), scale="constant", max_clients=2, max_round_bytes=3000
    )
    Round.open(tmp_path / "r", policy=of, duplicate="replace").close()
    for name, rank, code in (("a", 1, ""), ("b", 1, ""), ("c", 1, "round-full"), ("a", 2, ""), ("d", 1, "round-full")):
        with Round.open(tmp_path / "r") as round_:
            if not code:
                assert round_.add(sent(name, rank), client=name).new
                continue
            with pytest.raises(RefusedError) as caught:
                round_.add(sent(name, rank), client=name)
            assert caught.value.code == code
    with Round.open(tmp_path / "r") as round_:
        round_.drop("b", "tested")
        assert round_.add(sent("c", 1), client="c").new and round_.clients == ["a", "c"]


def test_threads_may_add_at_once(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(12)]
    with opened(tmp_path / "r") as round_:
        threads = [
            threading.Thread(target=round_.add, args=(sent(n, 1 + i % 4), 1.0 + i / 2), kwargs={"client": n})
            for i, n in enumerate(names)
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert round_.clients == sorted(names)
        update = round_.finish()
    with opened(tmp_path / "one") as round_:
        for i, n in enumerate(names):
            round_.add(sent(n, 1 + i % 4), 1.0 + i / 2, client=n)
        assert_identical(round_.finish(), update)


# -- what is turned away ---


@pytest.mark.parametrize("name", hostile.WEIGHTS)
def test_hostile_uploads_leave_evidence_and_no_more(name: str, tmp_path: Path) -> None:
    make, code = hostile.WEIGHTS[name]
    of = ff.RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(1, 2, 4), max_norm=1e3, max_extra_norm=1e3)
    upload = make()
    with Round.open(tmp_path / "r", policy=of) as round_:
        for _ in range(2):
            with pytest.raises(RefusedError) as caught:
                round_.add(upload, client="evil")
        assert caught.value.code == code
        assert not list((tmp_path / "r" / "spool").iterdir())
        (refusal,) = round_.status().refused
    assert (refusal.client, refusal.code) == ("evil", code)
    (record,) = (tmp_path / "r" / "quarantine").iterdir()
    kept = json.loads(record.read_text())
    assert (kept["client"], kept["code"], kept["reason"], kept["size"]) == ("evil", code, refusal.reason, len(upload))
    assert upload.startswith(base64.b64decode(kept["first"])) and record.stat().st_size < 20_000
    assert kept["sha256"] == hashlib.sha256(upload[: kept["read"]]).hexdigest()
    assert os.lstat(tmp_path / "r" / "quarantine").st_mode & 0o777 == 0o700


def test_refusals_outlive_the_server_and_the_round_goes_on(tmp_path: Path) -> None:
    round_ = filled(tmp_path / "r", "a")
    bad: list[tuple[Any, Any, Any, str]] = [
        (SENT["nan"], 1.0, "nan", "not-finite"),
        (sent("w"), 11.0, "w", "weight"),
        (tmp_path / "no", 1.0, "no", "not-found"),
        (3, 1.0, "three", "content"),
        (sent("w"), 1.0, "", "name"),
        (sent("w"), 1.0, 7, "name"),
        (sent("w"), 1.0, "x" * 257, "name"),
        (sent("w"), 1.0, "\ud800\x1b[2J", "ok"),
        (rounds.client("other", rank=2).adapter(), 1.0, "other", "unknown-tensor"),
    ]
    for upload, weight, name, code in bad:
        if code == "ok":
            round_.add(upload, weight, client=name)
            continue
        with pytest.raises((AdapterError, WeightError)) as caught:
            round_.add(upload, weight, client=name)
        assert caught.value.code == code
    expected = sorted(code for *_, code in bad if code != "ok")
    assert sorted(x.code for x in round_.status().refused) == expected
    round_.close()
    update = Round.open(tmp_path / "r").finish()
    assert sorted(x.code for x in update.refused) == expected
    assert [x.name for x in update.clients] == ["a", "\ud800\x1b[2J"] and str(examine(tmp_path / "r").view())


def test_the_quarantine_has_an_end(tmp_path: Path) -> None:
    small = Quarantine(records=5, first=100, bytes=1500)
    with opened(tmp_path / "r", quarantine=small) as round_:
        for i in range(20):
            with pytest.raises(RefusedError):
                round_.add(b"x" * 10_000, client=f"c{i}")
        assert len(round_.status().refused) == 5
        kept = list((tmp_path / "r" / "quarantine").iterdir())
        assert 0 < len(kept) < 5 and sum(path.stat().st_size for path in kept) <= 1500
    for wrong in ({"records": -1}, {"bytes": 1.5}, {"first": True}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Quarantine(**wrong)


# -- options ---


def test_a_private_round_is_none_to_replay(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a private round may be released once"):
        Round.open(tmp_path / "r", policy=policy(), rank=4, privacy=None)  # type: ignore[call-arg]
    assert not (tmp_path / "r").exists()


def test_a_round_is_taken_up_under_what_it_began_with(tmp_path: Path) -> None:
    filled(tmp_path / "r", seed=5, defence="clip:quantile=0.6", method="flexlora").close()
    Round.open(tmp_path / "r").close()
    Round.open(tmp_path / "r", policy=policy(), seed=5, rank=6, defence="clip:quantile=0.6").close()
    for other in ({"seed": 6}, {"rank": None}, {"defence": "clip"}, {"duplicate": "replace"}, {"min_clients": 2}):
        with pytest.raises(OptionError, match=next(iter(other))):
            Round.open(tmp_path / "r", **other)
    with pytest.raises(OptionError, match="policy"):
        Round.open(tmp_path / "r", policy=ff.RoundPolicy.from_adapter(client("ref", 4).adapter(), ranks=(1,)))
    options = Round.open(tmp_path / "r").status().options
    assert (options["seed"], options["rank"], options["duplicate"]) == (5, 6, "refuse")


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"solver": "x"}, {"duplicate": "x"}, {"spool": "x"}, {"read": "x"}, {"device": "x"}, {"defence": "x"},
     {"tol": float("inf")}, {"seed": torch.tensor(3)},
     {"min_clients": 0}, {"defence": ff.defence.FLTrust(reference=client("ref", 2).adapter())}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_wrong_options_leave_no_folder_behind(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ff.errors.FlexLoRAError, match=next(iter(wrong))):
        opened(tmp_path / "r", **wrong)
    with pytest.raises(OptionError, match="give the policy"):
        Round.open(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_method_of_ones_own_has_no_name_to_be_recorded_by(tmp_path: Path) -> None:
    class Own(ff.methods.METHODS["flexlora"]):  # type: ignore[misc]
        pass

    with pytest.raises(OptionError, match="register it"):
        opened(tmp_path / "r", method=Own())


def test_closed_is_closed(tmp_path: Path) -> None:
    round_ = filled(tmp_path / "r")
    round_.close()
    round_.close()
    with pytest.raises(JournalError, match="closed"):
        round_.add(sent("z"), client="z")
    assert round_.status().state == "open"


# -- a folder that something happened to ---


def _altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    _written(path, bytes(data))


def _written(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def _linked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


HARM: dict[str, Callable[[Path], Any]] = {
    "vanished": os.unlink,
    "altered": _altered,
    "cut short": lambda path: _written(path, path.read_bytes()[:-1]),
    "longer": lambda path: _written(path, path.read_bytes() + b"\0"),
    "a link": _linked,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("when", ["before it is taken up", "while it is open"])
@pytest.mark.parametrize("harm", HARM)
def test_an_upload_that_is_lost_is_named_and_can_be_sent_again(harm: str, when: str, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    round_ = filled(folder)
    path = spooled(folder, "b")
    if when == "before it is taken up":
        round_.close()
        HARM[harm](path)
        round_ = Round.open(folder, read="finish")
    else:
        round_.close()
        round_ = Round.open(folder, read="finish")
        round_.add(sent("d"), client="d")  # all are known by now
        HARM[harm](path)
    status = round_.status()
    assert status.state == "damaged" and [damage.client for damage in status.damage] == ["b"]
    assert "sent again" in status.damage[0].remedy and "'b'" in str(status.to_dict()) and status.view()
    with pytest.raises(DamagedRoundError, match="'b'") as caught:
        round_.finish()
    assert caught.value.client == "b" and not (folder / UPDATE).exists()
    assert round_.add(sent("b", 2), 2.0, client="b").new  # as acknowledged: it repairs the round
    if when != "before it is taken up":
        round_.drop("d", "only there for the test")
    update = round_.finish()
    with filled(tmp_path / "plain") as plain:
        assert_identical(update, plain.finish())
    round_.close()
    assert Round.open(folder).status().state == "finished"


def test_going_on_without_a_client_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    filled(folder).close()
    os.unlink(spooled(folder, "b"))
    with Round.open(folder) as round_:
        with pytest.raises(AdapterError, match="not in the round"):
            round_.drop("z", "x")
        round_.drop("b", "its disk died")
        update = round_.finish()
    assert [x.name for x in update.clients] == ["a", "c"]
    assert [(x.client, x.code) for x in update.refused] == [("b", "dropped")] and "its disk died" in update.refused[
        0
    ].reason
    with opened(tmp_path / "plain") as plain:
        plain.add(sent("a", 1), 1.0, client="a")
        plain.add(sent("c", 3), 3.0, client="c")
        assert_identical(update, plain.finish())


def test_a_finished_update_that_is_lost_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    round_ = filled(folder)
    round_.finish()
    good = (folder / UPDATE).read_bytes()
    for harm in ("vanished", "altered", "cut short", "a link"):
        HARM[harm](folder / UPDATE)
        assert examine(folder).state == "damaged" and examine(folder).update is None
        assert round_.finish().layers
        assert (folder / UPDATE).read_bytes() == good and examine(folder).state == "finished"
        (folder / UPDATE).with_suffix(".moved").unlink(missing_ok=True)


@pytest.mark.parametrize("part", ["spool", "quarantine", "."])
def test_links_in_the_place_of_folders_are_refused(part: str, tmp_path: Path) -> None:
    filled(tmp_path / "r").close()
    path = tmp_path / "r" if part == "." else tmp_path / "r" / part
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for look in (Round.open, examine):
        with pytest.raises(JournalError, match="no folder"):
            look(tmp_path / "r")


@pytest.mark.parametrize("name", ["manifest.jsonl", "round.json", "lock"])
def test_links_in_the_place_of_files_are_refused(name: str, tmp_path: Path) -> None:
    filled(tmp_path / "r").close()
    (tmp_path / "r" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "r" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError):
        Round.open(tmp_path / "r")


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    filled(folder).close()
    (folder / "notes.txt").write_text("mine")
    for name in ("notes", "999999999999"):
        (folder / "spool" / f"{name}.safetensors").write_text("mine")
        (folder / "spool" / f"{name}.safetensors").chmod(0o400)
    with Round.open(folder) as round_:
        assert round_.finish().layers and (folder / "notes.txt").exists()
    assert all((folder / "spool" / f"{name}.safetensors").exists() for name in ("notes", "999999999999"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(JournalError, match=r"thesis\.tex"):
        opened(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir() if path.name != "lock"] == ["thesis.tex"]
    for look in (Round.open, examine):
        with pytest.raises((JournalError, OptionError)):
            look(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalError):
        opened(tmp_path / "file")


@pytest.mark.parametrize("gone", ["spool", "manifest.jsonl", "quarantine"])
def test_a_round_that_lost_its_head_is_not_begun_again(gone: str, tmp_path: Path) -> None:
    """Any one part says that something was here."""
    round_ = filled(tmp_path / "r")
    with pytest.raises(RefusedError):
        round_.add(SENT["nan"], client="nan")
    round_.close()
    os.unlink(tmp_path / "r" / "round.json")
    for part in {"spool", "manifest.jsonl", "quarantine"} - {gone}:
        (shutil.rmtree if (tmp_path / "r" / part).is_dir() else os.unlink)(tmp_path / "r" / part)
    before = files(tmp_path / "r")
    with pytest.raises(JournalError, match="restore it from a copy"):
        opened(tmp_path / "r")
    assert files(tmp_path / "r") == before and before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda head: head | {"format": "flexlora_fast.round/9"}, "use the one that wrote it"),
        (lambda head: head | {"options": head["options"] | {"seed": 4}}, "not as it was written"),
        (lambda head: "[", "damaged"),
        (lambda head: [], "use the one that wrote it"),
    ],
    ids=["format", "altered", "no JSON", "a list"],
)
def test_a_head_that_is_another_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    filled(tmp_path / "r").close()
    head = change(json.loads((tmp_path / "r" / "round.json").read_text()))
    (tmp_path / "r" / "round.json").write_text(head if isinstance(head, str) else json.dumps(head))
    for look in (Round.open, examine):
        with pytest.raises(JournalError, match=told):
            look(tmp_path / "r")


def test_only_zero_weights_or_nobody(tmp_path: Path) -> None:
    with opened(tmp_path / "r") as round_:
        with pytest.raises(EmptyRoundError):
            round_.finish()
        round_.add(sent("a"), 0.0, client="a")
        with pytest.raises(WeightError):
            round_.finish()
        round_.add(sent("b"), torch.tensor(2.0).item(), client="b")
        assert [x.name for x in round_.finish().clients] == ["b"]
