"""What a defended round holds at once: peaks of whole rounds of 200 clients from files, against their limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import rounds
from tests.rounds import Layer
from tests.test_memory import MiB, run

ROUND = """
import json, sys
import flexlora_fast as ff
folder, limit, read, rule, out, count = sys.argv[1:]
def peak():
    status = open("/proc/self/status").read()  # VmHWM; ru_maxrss starts at the peak of the process that forked this one
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
def fed(names, **options):
    agg = ff.Aggregator(rank=8, read=read, progress=False, defence=rule if rule != "None" else None, **options)
    for i, name in enumerate(names):
        agg.add(f"{folder}/{name}", client=f"client-{i:05d}")
    return agg
fed(["warm"] * 3).finish()
before = peak()
update = fed([f"c{i % 10}" for i in range(int(count))], memory_limit=limit).finish(out)
statuses = {v.status for v in update.verdicts}
print(json.dumps([peak() - before, len(update.verdicts), sorted(statuses), sorted(update.solvers())]))
"""
CLIENTS, LAYERS, RANK = 200, 6, 16
M, N = 512, 640
FACTORS = CLIENTS * LAYERS * RANK * (M + N) * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clients of six layers, in float32, of which one is three times as long as the others."""
    made = tmp_path_factory.mktemp("round")
    layers = [Layer(f"h.{i}.fc", M, N) for i in range(LAYERS)]
    for i in range(10):
        rounds.client(f"c{i}", layers, rank=RANK, alpha=RANK if i else 3 * RANK).adapter().save(made / f"c{i}")
    rounds.client("warm", [Layer("h.0.fc", 64, 48)]).adapter().save(made / "warm")
    return made


@pytest.mark.parametrize("read", [pytest.param("add", marks=pytest.mark.slow), "finish"])
def test_the_gram_never_holds_all_factors(read: str, folder: Path, tmp_path: Path) -> None:
    """200 clients bring 84 MiB, 14 MiB a layer; a layer comes two pieces of its clients at a time."""
    limit = 32
    assert 2.5 * limit * MiB < FACTORS
    used, judged, statuses, solvers = run(ROUND, folder, f"{limit}MiB", read, "clip", tmp_path / "out", CLIENTS)
    assert judged == CLIENTS and statuses == ["accepted", "clipped"] and solvers == ["dense"]
    assert used <= 1.1 * limit * MiB + 16 * MiB, f"{used / MiB:.0f} MiB"


def test_judging_adds_little_to_a_rounds_peak(folder: Path, tmp_path: Path) -> None:
    """Grams that are kept for the solver, those of a layer in work and the K×K matrix, within the limit's share."""
    limit = 160
    used = {
        rule: run(ROUND, folder, f"{limit}MiB", "finish", rule, tmp_path / "out", CLIENTS // 4)[0]
        for rule in ("None", "clip")
    }
    assert used["clip"] <= used["None"] + limit * MiB / 4 + 16 * MiB, {rule: x / MiB for rule, x in used.items()}


@pytest.mark.parametrize("rule", ["median", pytest.param("trimmed-mean", marks=pytest.mark.slow)])
def test_coordinate_rules_keep_to_their_tiles(rule: str, folder: Path, tmp_path: Path) -> None:
    """All dense updates of one layer would be 125 MiB; a tile is 32."""
    limit, clients = 60, CLIENTS // 2
    assert clients * M * N * 4 > 2 * limit * MiB
    used, judged, _, solvers = run(ROUND, folder, f"{limit}MiB", "finish", rule, tmp_path / "out", clients)
    assert judged == 0 and solvers == ["dense"]
    assert used <= 1.1 * limit * MiB + 16 * MiB, f"{used / MiB:.0f} MiB"
