"""Manifests that were cut, altered or mixed up: no line is taken for another, and none is lost without a word."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_fast.errors import DamagedRoundError, OptionError, RefusedError
from flexlora_fast.journal import Round, examine, lines
from tests.kills import SENT, UPDATE, outcome, policy
from tests.test_journal import opened, sent

RECORDS = [
    {"n": 1, "kind": "accept", "client": 'a"\n{"n":9'},
    {"n": 2, "kind": "refuse", "client": '0123456789abcdef {"n":3,'},
    {"n": 3, "kind": "drop", "client": "ü\ud800"},
]
DATA = b"".join(lines.encode("k", record) for record in RECORDS)


def test_lines_come_back_as_they_were_written() -> None:
    content = lines.parse("k", DATA)
    assert content == lines.Content(RECORDS, 0, 0, b"", DATA) and DATA.isascii() and DATA.count(b"\n") == 3
    assert lines.parse("k", b"") == lines.Content([], 0, 0, b"", b"")


def test_lines_of_another_round_or_in_another_order_are_none() -> None:
    assert lines.parse("other", DATA).records == []
    one, two, three = DATA.splitlines(keepends=True)
    assert [r["n"] for r in lines.parse("k", two + one + three).records] == [2, 3]
    assert [r["n"] for r in lines.parse("k", one + one + two).records] == [1, 2]


@pytest.mark.parametrize("size", range(len(DATA)))
def test_a_manifest_that_was_cut_anywhere_keeps_what_is_whole(size: int) -> None:
    content = lines.parse("k", DATA[:size])
    whole = DATA[:size].count(b"\n")
    ended = DATA[size : size + 1] == b"\n"  # all but its end of line
    assert content.records == RECORDS[: whole + ended] and content.bad == 0
    assert b"".join(lines.encode("k", r) for r in content.records) == content.sound
    assert lines.parse("k", content.sound + DATA[len(content.sound) :]).records == RECORDS


@settings(max_examples=400)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_one_altered_byte_harms_one_line_at_most(at: int, change: int) -> None:
    data = bytearray(DATA)
    data[at] ^= change
    content = lines.parse("k", bytes(data))
    hit = DATA[:at].count(b"\n")
    kept = [record for i, record in enumerate(RECORDS) if i != hit]
    assert content.records in (kept, RECORDS)  # all of them where it was the end of a line
    assert content.records == RECORDS or content.bad or content.torn
    assert not (content.torn and content.bad) and content.sound[-1:] in (b"\n", b"")


@given(st.binary(max_size=200))
def test_noise_is_no_line(noise: bytes) -> None:
    assert lines.parse("k", noise).records == []
    assert lines.parse("k", DATA + noise).records == RECORDS


# -- in a round ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round with every kind of line but the last: lines 1 and 3 accept, 2 refuses, 4 drops, 5 replaces, 6 accepts."""
    folder = tmp_path_factory.mktemp("round") / "r"
    with opened(folder, duplicate="replace") as round_:
        _send(round_)
    return folder


def _send(round_: Round) -> None:
    known = round_.clients
    round_.add(sent("a", 2), 2.0, client="a")
    if "b" not in known:
        with pytest.raises(RefusedError):
            round_.add(SENT["nan"], client="nan")
        round_.add(sent("gone", 2), client="gone")
        round_.drop("gone", "tested")
        round_.add(sent("a", 3), 3.0, client="a")
    round_.add(sent("a", 3), 3.0, client="a")
    round_.add(sent("b", 1), 1.0, client="b")


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def _finished(folder: Path) -> bytes:
    with Round.open(folder, progress=False) as round_:
        round_.finish()
    return (folder / UPDATE).read_bytes()


def test_a_flipped_bit_in_any_byte_of_any_line_is_told_and_can_be_made_good(undisturbed: Path, tmp_path: Path) -> None:
    """For each line a byte of its checksum, its number, its content and its end."""
    expected = _finished(_copy(undisturbed, tmp_path / "good"))
    data = (undisturbed / "manifest.jsonl").read_bytes()
    starts = [0, *(i + 1 for i, c in enumerate(data) if c == 10)]
    assert len(starts) == 7
    for n, (start, stop) in enumerate(pairwise(starts), start=1):
        for at in (start, start + 16, start + 22, (start + stop) // 2, stop - 2, stop - 1):
            folder = _copy(undisturbed, tmp_path / f"{n}-{at}")
            altered = bytearray(data)
            altered[at] ^= 1
            (folder / "manifest.jsonl").write_bytes(altered)
            status = examine(folder)
            with Round.open(folder, progress=False) as round_:
                if at == stop - 1:  # the end of a line can be put right
                    assert status.state == "open"
                    continue
                assert status.state == "damaged" and n in [damage.line for damage in status.damage]
                with pytest.raises(DamagedRoundError, match=f"line {n}"):
                    round_.finish()
                _send_again(round_, n)
                round_.finish()
            if n != 2:  # the refusal itself is gone with its line
                assert (folder / UPDATE).read_bytes() == expected, n
            assert examine(folder).state == "finished"
            shutil.rmtree(folder)


def _send_again(round_: Round, n: int) -> None:
    """Clients send what they had sent; what that does not make good, the server goes on without."""
    lost = {damage.line for damage in round_.status().damage}
    round_.add(sent("b", 1), 1.0, client="b")
    round_.add(sent("a", 3), 3.0, client="a")
    with pytest.raises(RefusedError):
        round_.add(SENT["nan"], client="nan")
    for damage in round_.status().damage:
        if damage.client == "gone":
            round_.drop("gone", "tested")
    left = {damage.line for damage in round_.status().damage}
    assert (n in lost) and (left == set() if n in (5, 6) else left <= {n})  # those whose upload is still there
    if "gone" not in [x.client for x in round_.status().refused]:
        round_.add(sent("gone", 2), client="gone")
        round_.drop("gone", "tested")
    for line in left - {None}:
        assert line is not None
        round_.forgo(line, "tested")
    with pytest.raises(OptionError, match="is not lost"):
        round_.forgo(n, "twice")


def test_lines_that_are_gone_with_their_ends_are_missed(undisturbed: Path, tmp_path: Path) -> None:
    """What was acknowledged is sealed in the spool: a manifest that ends too early is not taken for all there was."""
    data = (undisturbed / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    expected = _finished(_copy(undisturbed, tmp_path / "good"))
    for kept, lost in ((5, {6}), (4, {5, 6}), (0, {1, 2, 3, 4, 5, 6})):
        folder = _copy(undisturbed, tmp_path / str(kept))
        (folder / "manifest.jsonl").write_bytes(b"".join(data[:kept]))
        if kept == 0:
            os.unlink(folder / "manifest.jsonl")
        damage = examine(folder).damage
        assert lost == {x.line for x in damage if x.line}
        assert {x.line for x in damage if "SHA-256" in x.problem} == lost & {5, 6}
        with Round.open(folder, policy=policy(), progress=False) as round_:
            with pytest.raises(DamagedRoundError):
                round_.finish()
            _send(round_)
            for line in lost - {5, 6}:
                round_.forgo(line, "tested")
            assert round_.status().state == "open"
            round_.finish()
        if kept:
            assert (folder / UPDATE).read_bytes() == expected
        assert outcome(folder)[1] == ["a", "b"]


def test_a_torn_line_is_kept_aside_and_its_upload_may_come_again(undisturbed: Path, tmp_path: Path) -> None:
    folder = _copy(undisturbed, tmp_path / "r")
    path = folder / "manifest.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    os.chmod(folder / "spool" / "000006.safetensors", 0o600)  # no line, so nobody had sealed it
    assert examine(folder).state == "open"
    with Round.open(folder, progress=False) as round_:
        assert round_.clients == ["a"]
        (aside,) = (folder / "quarantine").glob("*.torn")
        torn = aside.read_bytes()
        assert data[:-20].endswith(torn) and path.read_bytes() + torn == data[:-20]
        assert not (folder / "spool" / "000006.safetensors").exists()
        assert round_.add(sent("b", 1), 1.0, client="b").new
        round_.finish()
    assert (folder / UPDATE).read_bytes() == _finished(_copy(undisturbed, tmp_path / "good"))


def test_the_lines_are_json_for_people_too(undisturbed: Path) -> None:
    kinds = []
    for line in (undisturbed / "manifest.jsonl").read_text().splitlines():
        record = json.loads(line[17:])
        kinds.append(record["kind"])
        assert record["n"] == len(kinds) and record["time"].endswith("+00:00")
    assert kinds == ["accept", "refuse", "accept", "drop", "accept", "accept"]
