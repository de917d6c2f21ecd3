"""The defences' benchmark: what its tables and its picture say, on a few small rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import defence_plot
from benchmarks import defences as benchmark
from flexlora_fast import defence
from tests.defences import ATTACKS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SEEDS", range(1))
    monkeypatch.setattr(benchmark, "CLIENTS", 10)
    monkeypatch.setattr(benchmark, "FACTORS", benchmark.SHOWN)
    monkeypatch.setattr(benchmark, "ATTACKS", {name: ATTACKS[name] for name in ("NaN", "scaling ×100")})


@pytest.mark.usefixtures("small")
def test_errors_by_rule_and_attack(tmp_path: Path) -> None:
    found = benchmark.errors()
    assert list(found) == ["honest alone", "none", *(rule for rule in defence.RULES if rule != "fltrust"), "fltrust"]
    assert found["clip"]["scaling ×100"][2] < 2 * found["honest alone"]["NaN"][2] < found["none"]["scaling ×100"][2]
    lines = list(benchmark.error_lines(found))
    assert lines[0] == "| defence | NaN | scaling ×100 |" and "stops / stops" in lines[3] and len(lines) == 13
    defence_plot.plot(found, benchmark.SHARES, tmp_path / "plot.png")
    assert 10_000 < (tmp_path / "plot.png").stat().st_size < 200_000


@pytest.mark.usefixtures("small")
def test_the_default_rule_against_absurd_norms() -> None:
    rows = [line.split(" | ") for line in benchmark.default_lines(0.4)][2:]
    assert len(rows) == 2 * (len(benchmark.SHOWN) + 3)
    exact = {row[0].removeprefix("| "): row[3] for row in rows if row[1] == "30 %"}
    assert exact["NaN"] == exact["scaling ×1e+06"] == "1.000 (1.000…1.000)"


def test_the_committed_table_is_what_the_benchmark_prints() -> None:
    text = (ROOT / "benchmarks/results/defences.md").read_text(encoding="utf-8")
    assert all(f"\n| {rule} | " in text for rule in ("honest alone", "none", *defence.RULES))
    assert all(f" {attack} |" in text for attack in ATTACKS)
    assert (ROOT / "benchmarks/results/defences.png").stat().st_size < 200_000
