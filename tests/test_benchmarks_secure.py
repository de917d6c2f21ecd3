"""The figures of secure aggregation, at small sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import secure
from benchmarks.workloads import Workload


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark takes one thread for its whole process, which goes on to other tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_errors_are_ratios_to_the_best() -> None:
    header, body, worst = secure.errors(quick=True)
    assert len(header) == 5 and [row[0] for row in body] == list(secure.PROTOCOLS)
    assert 1 <= worst <= secure.BOUND
    assert all(float(cell) >= 0.999 for row in body for cell in row[1:])


def test_the_float_twin_is_the_coded_protocol_without_rounding() -> None:
    clients = secure.adapters(Workload("twin", 90, 110, (2, 3, 5), 0))
    delta = torch.stack([a.delta("fc").double() for a in clients]).mean(dim=0)
    for count in (2, 3, 4):
        plan = secure.plan_of(clients, 4, rounds=count, bits=64)
        (B, A), (B2, A2) = secure.floating(plan, clients), secure.through(plan, clients)
        assert torch.allclose(B @ A, B2.double() @ A2.double(), atol=1e-6 * float(delta.norm()))


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the times, which take a process of their own."""
    monkeypatch.setattr(secure, "times", lambda *_: (["", "all rounds"], [["two-round", "1 s"]]))
    monkeypatch.setattr(sys, "argv", ["secure", "--quick", "--out", str(tmp_path / "out.md")])
    secure.main()
    told = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == told
    assert "(the worst of all above) | yes |" in told and "| two-round | 1 s |" in told


def test_bytes() -> None:
    _, body = secure.sizes(16)
    plain, *protocols = body[: 1 + len(secure.PROTOCOLS)]
    assert plain[3] == "98"  # 4·16·(768 + 768)
    by_name = {row[1]: row for row in protocols}
    # (768 + 768)·24 entries for each range and projection, and 32² probes; each basis is 768·24 floats.
    assert by_name["two-round"][2:4] == ["2", f"{4 * (24 * 1536 + 1024) / 1000:.0f}"]
    assert by_name["two-round"][6] == f"{4 * 24 * 768 / 1000:.0f}"
    assert by_name["one-round, k = 2R + 1"][2] == "1" and by_name["one-round, k = 2R + 1"][6] == "–"


@pytest.mark.parametrize("name", ["one-round, k = 2R + 1", "two-round + 1 power step"])
def test_a_client_is_timed_in_every_round(name: str) -> None:
    times = secure.client_rounds(name, layers=1, side=200)()
    assert len(times) == secure.PROTOCOLS[name]["rounds"] and min(times) > 0
