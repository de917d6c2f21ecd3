"""The table of a defence's verdicts, with few clients and with many."""

from __future__ import annotations

import json

import flexlora_fast as ff
from flexlora_fast.defence import Verdict
from flexlora_fast.tables import plain
from flexlora_fast.verdicts import tally, verdict_table
from tests.defences import alike, attacked
from tests.test_defence import aggregate


def made(accepted: int, clipped: int, rejected: int) -> list[Verdict]:
    K = accepted + clipped + rejected
    share = 1 / (accepted + clipped)
    return [
        *(Verdict(f"good-{i}", 5.0 + i, 1 / K, share, 1.0, "accepted", "") for i in range(accepted)),
        *(Verdict(f"long-{i}", 200.0 + i, 1 / K, share, 0.5 + i / 1e3, "clipped", "too long") for i in range(clipped)),
        *(Verdict(f"bad-{i}", 1e6 + i, 1 / K, 0.0, 0.0, "rejected", "far too long") for i in range(rejected)),
    ]


def lines(verdicts: list[Verdict], listed: int | None) -> list[str]:
    return [line for line in plain(verdict_table("clip", verdicts, listed)).splitlines() if line]


def test_few_clients_are_all_named_and_the_least_trusted_come_first() -> None:
    text = lines(made(3, 2, 1), 40)
    assert text[0] == "Defence clip"
    assert [line.split()[0] for line in text[3:]] == ["bad-0", "long-0", "long-1", "good-2", "good-1", "good-0"]


def test_a_weight_that_is_next_to_nothing() -> None:
    """Of weights 1e-300 and 1e300 one is rounded to 0."""
    clients = [c.but(weight=w) for c, w in zip(alike(3), (1e-300, 1e300, 1e300), strict=True)]
    assert "c00" in str(aggregate(clients, "clip").report())


def test_many_clients_come_in_sums() -> None:
    text = lines(made(300, 90, 10), 40)
    assert text[0] == "Defence clip (40 of 400 clients by name)" and len(text) == 3 + 40 + 2
    assert [line.split()[0] for line in text[3:14]] == [*(f"bad-{i}" for i in range(9, -1, -1)), "long-0"]
    assert text[-2].split() == ["60", "clients", "more", "clipped", "230…289", "15.0%", "15.4%", "0.5300…0.5890"]
    assert text[-1].split() == ["300", "clients", "accepted", "5…304", "75.0%", "76.9%", "1"]
    assert len(lines(made(300, 90, 10), None)) == 3 + 400
    assert tally(made(300, 90, 10)) == ": 300 accepted, 90 clipped, 10 rejected" and tally([]) == ""


def test_a_crowd_of_rejected_is_cut_too() -> None:
    text = lines(made(5, 0, 95), 40)
    assert text[-2].split()[:4] == ["55", "clients", "more", "rejected"] and text[-1].split()[1:3] == [
        "clients",
        "accepted",
    ]


def test_reports_of_many_clients_stay_short_and_documents_are_whole(tmp_path) -> None:
    clients = attacked(alike(120), "scaling ×100", 12)
    report = ff.GlobalUpdate.load(aggregate(clients, "clip", rank=2).save(tmp_path / "u")).report()
    shown = str(report)
    table = shown[shown.index("Defence clip") :]
    assert "54 clients" in table and len(table.splitlines()) < 50
    assert sum(name in table for name in (f"c{i:02d} " for i in range(12))) == 12  # the rejected
    document = report.markdown()
    assert all(f"{c.name} " in document[document.index("Defence clip") :] for c in clients)
    assert len(json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdicts"]) == 120
