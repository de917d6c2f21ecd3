"""`flexlora-fast round`: what it says of a round, and what it writes when it takes one up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import flexlora_fast as ff
from flexlora_fast.errors import RefusedError
from flexlora_fast.journal import Round, examine
from tests.command import run, start
from tests.kills import SENT, UPDATE
from tests.test_journal import filled, sent, spooled


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A round of three clients and a refused one, whose server has died."""
    round_ = filled(tmp_path / "0007")
    with pytest.raises(RefusedError):
        round_.add(SENT["nan"], client="e\x1b[2Jvil")
    round_.close()
    return tmp_path / "0007"


def test_status_of_an_open_round_as_a_program(left: Path) -> None:
    done = start("round", "status", left)
    assert (done.returncode, done.stderr) == (0, "")
    assert "open: 3 clients" in done.stdout and "not-finite" in done.stdout and "\x1b" not in done.stdout
    found = json.loads(start("round", "status", left, "--json").stdout)
    assert found["state"] == "open" and [x["client"] for x in found["clients"]] == ["a", "b", "c"]
    assert found["refused"][0]["code"] == "not-finite" and found["options"]["rank"] == 6 and found["damage"] == []


def test_resume_gives_what_the_server_would_have(left: Path, tmp_path: Path) -> None:
    with filled(tmp_path / "other") as round_:
        with pytest.raises(RefusedError):
            round_.add(SENT["nan"], client="e\x1b[2Jvil")
        expected = round_.finish()
    done = start("round", "resume", left)
    assert (done.returncode, done.stderr) == (0, "") and "3 clients" in done.stdout and UPDATE in done.stdout
    assert (left / UPDATE).read_bytes() == (tmp_path / "other" / UPDATE).read_bytes()
    assert run("round", "status", left, "--json").exit_code == 0 and examine(left).state == "finished"
    again = run("round", "resume", left, "--out", tmp_path / "out", "--ranks", "2,6", "--per-client", "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["out"] == str(tmp_path / "out") and document["update"] == str(left / UPDATE)
    assert (tmp_path / "out" / UPDATE).read_bytes() == (left / UPDATE).read_bytes()
    for name in "abc":
        written = ff.Adapter.load(tmp_path / "out" / "clients" / name)
        assert written.skeleton.ranks == expected.adapter(client=name).skeleton.ranks
    assert ff.Adapter.load(tmp_path / "out" / "rank-6").rank("up") == 6
    assert "not empty" in run("round", "resume", left, "--out", tmp_path / "out").output


def test_nobody_is_left_out_where_one_name_is_wrong(left: Path) -> None:
    done = run("round", "resume", left, "--without", "a", "--without", "typo")
    assert done.exit_code == 1 and "'typo' is not in the round" in done.output
    assert [entry.client for entry in examine(left).clients] == ["a", "b", "c"] and spooled(left, "a").exists()
    assert run("round", "resume", left, "--without", "a", "--without", "a").exit_code == 0
    assert [entry.client for entry in examine(left).clients] == ["b", "c"]


def test_damage_is_said_and_gone_without(left: Path, tmp_path: Path) -> None:
    os.unlink(spooled(left, "b"))
    data = (left / "manifest.jsonl").read_bytes()
    at = data.index(b'"n":4') + 20
    (left / "manifest.jsonl").write_bytes(data[:at] + b"~" + data[at + 1 :])
    done = run("round", "status", left)
    assert done.exit_code == 1 and "damaged" in done.stdout and "has vanished" in done.stdout
    assert "sent again" in done.stdout and "line 4" in done.stdout
    failed = run("round", "resume", left)
    assert failed.exit_code == 1 and "--without" in failed.output and not (left / UPDATE).exists()
    unknown = run("round", "resume", left, "--without", "z")
    assert unknown.exit_code == 1 and "not in the round" in unknown.output
    assert run("round", "resume", left, "--without-line", "3").exit_code == 1
    done = run("round", "resume", left, "--without", "b", "--without-line", "4", "--json")
    assert done.exit_code == 0, done.output
    assert [x["name"] for x in json.loads(done.stdout)["clients"]] == ["a", "c"]
    assert [x.code for x in examine(left).refused] == ["dropped"]


def test_wrong_calls_and_folders(left: Path, tmp_path: Path) -> None:
    assert run("round", "status", tmp_path).exit_code == 1
    assert run("round", "resume", tmp_path / "nothing").exit_code == 1
    elsewhere = ["--out", tmp_path / "o"]
    for wrong in (["--ranks", "2"], ["--split", "x", *elsewhere], ["--ranks", "0", *elsewhere], ["--dtype", "x"]):
        assert run("round", "resume", left, *wrong).exit_code == 2
    assert run("round", "resume", left, "--out", tmp_path).exit_code == 2  # it holds the round
    with Round.open(left) as round_:
        busy = run("round", "resume", left)
        assert busy.exit_code == 1 and f"in use by process {os.getpid()}" in busy.output
        round_.add(sent("d"), client="d")
        assert "4 clients" in run("round", "status", left).stdout
