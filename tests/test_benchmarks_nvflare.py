"""The comparison with a rule that leaves scales out: its inputs and its claim."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import nvflare_hlora as benchmark


def test_unchanged_clients_all_send_one_update() -> None:
    layer = benchmark.LAYERS[0].name
    deltas = [one.scales[layer] * one.factors[layer][1][0] @ one.factors[layer][0][0] for one in benchmark.unchanged()]
    assert all(torch.allclose(delta, deltas[0], atol=1e-5) for delta in deltas)


@pytest.mark.parametrize("rank", benchmark.RANKS)
def test_the_scale_error_is_what_the_formula_says(rank: int) -> None:
    clients = benchmark.unchanged()
    total = sum(one.weight for one in clients)
    layer = benchmark.LAYERS[0].name
    factor = benchmark.ALPHA / rank * math.fsum(one.weight / total / one.scales[layer] for one in clients)
    plain, own = benchmark.errors(clients, rank)
    assert plain == pytest.approx(abs(factor - 1), rel=1e-3)
    assert plain > 0.1 and own < 1e-5


def test_where_all_scales_are_one_both_agree() -> None:
    clients = [
        benchmark.client(f"c{i}", benchmark.LAYERS[:1], rank=16, alpha=16, weight=1.0 + i, seed=3) for i in range(3)
    ]
    plain, own = benchmark.errors(clients, 16)
    assert max(plain, own) < 1e-5


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RUNS", 1)
    monkeypatch.setattr(benchmark, "LAYERS", benchmark.LAYERS[:1])
    benchmark.main(["--out", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    assert text.count("| same ΔW from all |") == 3 and text.strip() in capsys.readouterr().out
