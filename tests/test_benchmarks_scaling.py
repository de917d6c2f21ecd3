"""The scaling benchmark at a small size: its columns, and that it can tell equal updates from others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import flexlora_fast as ff
from benchmarks import scaling
from benchmarks.models import ModelRound
from tests import rounds

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each rank")


@pytest.mark.slow
def test_a_page_of_two_small_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelRound("small", (("a", 40, 30), ("b", 30, 40)), (2, 4, 8))
    monkeypatch.setattr(
        scaling,
        "ROUNDS",
        (("layers", small, {"shard": "layers"}), ("clients", small, {"shard": "clients", "solver": "factored"})),
    )
    text = scaling.page(tmp_path, 1)
    layers, clients = text.strip().split("\n")[-2:]
    assert layers.startswith("| layers: 2 layers, 3 clients") and layers.endswith("| bit for bit |")
    assert "of ‖ΔW‖ |" in clients or clients.endswith("| bit for bit |")
    assert all(line.count("|") == 10 for line in (layers, clients)) and "Load average" in text


def test_updates_are_compared() -> None:
    clients = rounds.typical("linear")
    one, two = (ff.aggregate([c.adapter() for c in clients], rank=4, seed=seed, solver="subspace") for seed in (0, 1))
    assert scaling.compared(one, one) == "bit for bit"
    assert scaling.compared(one, two).endswith("of ‖ΔW‖")
    assert float(scaling.compared(one, two).split()[1]) < 1e-2
    other = ff.aggregate([c.adapter() for c in clients[1:]], rank=4)
    assert float(scaling.compared(one, other).split()[1]) > 1e-2
