"""Policies on the command line: written to a file, and in front of folders of strangers."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast import inputs
from flexlora_fast.errors import EmptyRoundError
from flexlora_fast.gate import RoundPolicy
from tests import command, hostile, rounds
from tests.checks import assert_identical
from tests.command import run


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    command.adapter(4, 9).save(tmp_path / "reference")
    done = run("policy", tmp_path / "reference", "--ranks", "2,4", "--max-layer-norm", 1e3, "--max-weight", 2000,
               "--out", tmp_path / "policy.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    return tmp_path / "policy.json"


def strangers(folder: Path) -> tuple[Path, dict[str, str]]:
    """Two honest clients, and hostile ones with the codes that they are refused with."""
    command.adapter(2, 0).save(folder / "anna")
    command.adapter(4, 2, dtype=torch.bfloat16).save(folder / "carl")
    codes = {}
    for name, (make, code) in {
        "wrong": (lambda: b"junk" * 9, "header"),
        "bin": (None, "pickle"),
        "linked": (None, "not-a-file"),
        "loop": (None, "not-a-file"),
        "weights-linked": (None, "not-a-file"),
    }.items():
        codes[name] = code
        if make is not None:
            command.adapter(4, 1).save(folder / name)
            (folder / name / "adapter_model.safetensors").write_bytes(make())
    (folder / "bin").mkdir()
    (folder / "bin" / "adapter_model.bin").write_bytes(hostile.torch_file())
    (folder / "linked").symlink_to(folder / "anna")
    (folder / "loop").symlink_to(folder / "loop")
    command.adapter(4, 1).save(folder / "weights-linked")
    (folder / "weights-linked" / "adapter_model.safetensors").unlink()
    (folder / "weights-linked" / "adapter_model.safetensors").symlink_to("/dev/zero")
    command.adapter(4, 1, bad=True).save(folder / "nan")
    command.adapter(3, 1).save(folder / "rank")
    command.adapter(4, 1, alpha=13).save(folder / "alpha")
    (folder / "nothing").mkdir()
    return folder, codes | {"nan": "not-finite", "rank": "rank", "alpha": "scale"}


def test_the_policy_command_writes_what_the_class_says(policy: Path, tmp_path: Path) -> None:
    expected = RoundPolicy.from_adapter(tmp_path / "reference", ranks=(2, 4), max_weight=2000.0, max_layer_norm=1e3)
    assert RoundPolicy.load(policy) == expected
    options = {"max-norm": 7, "max-extra-norm": 8, "max-bytes": 900, "max-clients": 3, "max-round-bytes": 10**6}
    flags = [x for name, value in options.items() for x in (f"--{name}", value)]
    done = run("policy", tmp_path / "reference", "--ranks", "8", "--scale", "constant", "--dtypes", "bfloat16, float16",
               "--partial", "--json", *flags, "--out", tmp_path / "p.json")  # fmt: skip
    document = json.loads(done.stdout)
    assert document == RoundPolicy.load(tmp_path / "p.json").to_json()
    assert RoundPolicy.load(tmp_path / "p.json") == RoundPolicy.from_adapter(
        tmp_path / "reference",
        ranks=(8,),
        scale="constant",
        dtypes=(torch.bfloat16, torch.float16),
        partial=True,
        **{name.replace("-", "_"): value for name, value in options.items()},
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--ranks", "0"], 2, "whole numbers"),
        (["--ranks", "4", "--scale", "beta"], 2, "--scale"),
        (["--ranks", "4", "--dtypes", "int8"], 2, "--dtypes"),
        (["--ranks", "4", "--max-norm", "-1"], 2, "max_norm"),
        (["--ranks", "4", "--max-clients", "0"], 2, "max_clients"),
    ],
)
def test_a_wrong_policy_is_a_wrong_call(arguments: Any, code: int, says: str, tmp_path: Path) -> None:
    command.adapter(4, 9).save(tmp_path / "reference")
    done = run("policy", tmp_path / "reference", *arguments, "--out", tmp_path / "p.json")
    assert done.exit_code == code and says in " ".join(done.output.split()) and not (tmp_path / "p.json").exists()
    there = run("policy", tmp_path / "reference", "--ranks", "4", "--out", tmp_path)
    assert there.exit_code == 2 and "is a folder" in there.output


@pytest.mark.parametrize("wanted", [[], ["--ranks", "2"], ["--ranks", "2", "--per-client"]])
def test_a_round_of_strangers(wanted: list[str], policy: Path, tmp_path: Path) -> None:
    """The honest ones are aggregated as in a round of their own, the others refused with their codes."""
    folder, codes = strangers(tmp_path / "clients")
    done = run("aggregate", folder, "--policy", policy, "--out", tmp_path / "out", *wanted)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {r["client"]: r["code"] for r in document["refused"]} == codes
    assert [c["name"] for c in document["clients"]] == ["anna", "carl"] and "nothing" in done.output
    honest = run("aggregate", folder / "anna", folder / "carl", "--out", tmp_path / "honest", *wanted)
    assert honest.exit_code == 0, honest.output
    one, two = (ff.GlobalUpdate.load(tmp_path / name / "global_update.safetensors") for name in ("out", "honest"))
    assert all(torch.equal(one[layer].S, two[layer].S) for layer in two.layers) and one.layers == two.layers
    strict = run("aggregate", folder, "--policy", policy, "--out", tmp_path / "strict", "--strict", *wanted)
    assert strict.exit_code == 1 and "--strict was asked for" in strict.output and not (tmp_path / "strict").exists()


def test_nothing_of_theirs_is_opened_but_by_the_gate(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own ``open`` never gets a path below their folder, and ``os.open`` only without following links."""
    folder, _ = strangers(tmp_path / "clients")
    opened, plain, low = [], builtins.open, os.open

    def watched(path: Any, *args: Any, **options: Any) -> Any:
        if str(folder) in str(path):
            opened.append(str(path))
        return plain(path, *args, **options)

    def watched_low(path: Any, flags: int, *args: Any, **options: Any) -> Any:
        if str(folder) in str(path) and not flags & os.O_NOFOLLOW:
            opened.append(str(path))
        return low(path, flags, *args, **options)

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr("io.open", watched)
    monkeypatch.setattr(os, "open", watched_low)
    monkeypatch.setattr(ff.Adapter, "load", lambda *_, **__: pytest.fail("Adapter.load of a stranger's folder"))
    done = run("aggregate", folder, "--policy", policy, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert not opened


def test_weights_and_quotas_of_the_policy(policy: Path, tmp_path: Path) -> None:
    folder, _ = strangers(tmp_path / "clients")
    names = ["anna", "carl"]
    done = run("aggregate", *(folder / name for name in names), "--policy", policy, "--weights", "2001,5", "--json",
               "--out", tmp_path / "out")  # fmt: skip
    assert {r["client"]: r["code"] for r in json.loads(done.stdout)["refused"]} == {"anna": "weight"}
    run("policy", tmp_path / "reference", "--ranks", "2,4", "--max-clients", 1, "--out", policy)
    done = run("aggregate", *(folder / name for name in names), "--policy", policy, "--json", "--out", tmp_path / "b")
    assert {r["client"]: r["code"] for r in json.loads(done.stdout)["refused"]} == {"carl": "round-full"}


@pytest.mark.parametrize("content", ["{", '{"format": "x"}'])
def test_a_policy_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    folder, _ = strangers(tmp_path / "clients")
    (tmp_path / "bad.json").write_text(content)
    done = run("aggregate", folder, "--policy", tmp_path / "bad.json", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "policy" in done.output and not (tmp_path / "out").exists()


def test_links_are_clients_to_be_refused_only_where_nothing_is_trusted(tmp_path: Path) -> None:
    folder, codes = strangers(tmp_path / "clients")
    trusted, skipped = inputs.find([folder])
    assert {s.name for s in trusted} == {"anna", "carl", *codes} - {"loop"} and [x.name for x in skipped] == ["nothing"]
    untrusted, skipped = inputs.find([folder], trusted=False)
    assert {s.name for s in untrusted} == {"anna", "carl", *codes} and [x.name for x in skipped] == ["nothing"]


def test_one_call_under_a_policy_goes_on_without_the_refused(tmp_path: Path) -> None:
    good = [rounds.client(f"c{i}", rank=i, seed=i) for i in (1, 2, 4)]
    policy = RoundPolicy.from_adapter(rounds.client("ref").adapter(), ranks=range(1, 5))
    uploads: list[Any] = []
    for c in good:
        c.adapter().save(tmp_path / c.name)
        uploads.append(tmp_path / c.name)
    uploads[1] = save({key: tensor.contiguous() for key, tensor in good[1].state_dict().items()})
    names = ["c1", "c2", "c4", "evil", "dup"]
    update = ff.aggregate([*uploads, b"junk", uploads[0]], [1.0, 0.5, 0.25, 1, 1], clients=names, policy=policy)
    assert [(r.client, r.code) for r in update.refused] == [("evil", "header")]
    assert [c.name for c in update.clients] == ["c1", "c2", "c4", "dup"]
    plain = ff.aggregate([c.adapter() for c in [*good, good[0]]], [1.0, 0.5, 0.25, 1], clients=[*names[:3], "dup"])
    assert_identical(update, plain)
    with pytest.raises(EmptyRoundError, match="no client is in this round; 1 were refused"):
        ff.aggregate([b"junk"], policy=policy)
