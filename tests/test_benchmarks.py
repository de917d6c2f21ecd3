"""The benchmark suite's parts: peers and truth against dense float64, formulas, files, a quick run of some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("sklearn")

import flexlora_fast as ff
from benchmarks import costs, fresh, gathering, layers, machine, models, peft_merge, planner, rounds, trained
from benchmarks.machine import Limits
from benchmarks.peers import METHODS, OURS, Answer
from benchmarks.truth import Truth
from benchmarks.workloads import FULL, Workload, stack_of
from flexlora_fast import _native

SLIM = Workload("slim", 60, 45, (2, 5, 9), 6)  # R = 16, below the short side
FAT = Workload("fat", 40, 55, (20, 30, 40), 7, "flat")  # R = 90, beyond it
LIMITS = Limits(1e11, 2e11, 1e10, 2e10)
# Largest excess of each method on SLIM and FAT; the rest are exact to float32.
LOOSE = {
    OURS: 1e-3,
    "dense + svd_lowrank": 2e-3,
    "sklearn randomized_svd": 2e-3,
    "two-stage sketch": 0.2,
}


def dense(workload: Workload) -> torch.Tensor:
    return sum((c * B.double() @ A.double() for B, A, c in workload.clients()), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("workload", [SLIM, FAT], ids=lambda w: w.name)
@pytest.mark.parametrize("name", METHODS)
def test_methods_answer_the_question(name: str, workload: Workload) -> None:
    clients = workload.clients()
    before = [(B.clone(), A.clone()) for B, A, _ in clients]
    call = METHODS[name](clients, workload.k)
    for answer in (call(), call()):  # timed more than once: the second must not see the first
        assert answer.B.shape == (workload.m, workload.k)
        assert answer.A.shape == (workload.k, workload.n)
        S = torch.linalg.svdvals(dense(workload))
        error = torch.linalg.matrix_norm(dense(workload) - answer.B.double() @ answer.A.double())
        assert float(error / S[workload.k :].norm()) - 1 <= LOOSE.get(name, 1e-5)
    for (B, A, _), (B0, A0) in zip(clients, before, strict=True):
        assert torch.equal(B, B0) and torch.equal(A, A0)


@pytest.mark.parametrize("workload", [SLIM, FAT], ids=lambda w: w.name)
def test_truth_is_the_dense_float64_svd(workload: Workload) -> None:
    truth, delta = Truth(workload.clients()), dense(workload)
    S = torch.linalg.svdvals(delta)
    assert truth.energy == pytest.approx(float(S.square().sum()), rel=1e-12)
    assert truth.tail(workload.k) == pytest.approx(float(S[workload.k :].square().sum()), rel=1e-9)
    U, _, Vh = torch.linalg.svd(delta)
    k = workload.k
    assert truth.excess(U[:, :k] * S[:k], Vh[:k], k) == pytest.approx(0, abs=1e-9)
    worse = float((delta - (U[:, : k - 1] * S[: k - 1]) @ Vh[: k - 1]).norm() / S[k:].norm()) - 1
    assert truth.excess(U[:, : k - 1] * S[: k - 1], Vh[: k - 1], k) == pytest.approx(worse, rel=1e-9)


def test_excess_where_nothing_is_left_out_is_the_relative_error() -> None:
    truth, delta = Truth(SLIM.clients()), dense(SLIM)
    U, S, Vh = torch.linalg.svd(delta)
    assert truth.excess(U[:, :16] * S[:16], 1.01 * Vh[:16], 16) == pytest.approx(0.01, rel=1e-6)


def test_workloads_are_what_the_tables_say() -> None:
    sizes = {w.name: (w.m, w.n, len(w.ranks), w.R, w.k) for w in FULL}
    assert sizes["silo"] == (4096, 4096, 10, 248, 64)
    assert sizes["device"] == sizes["flat"] == (4096, 4096, 100, 1600, 64)
    assert sizes["paper"][:3] == (2048, 2048, 80) and sizes["paper"][4] == 200
    assert sizes["wide"] == (4096, 11008, 1000, 8000, 64)
    big, tiny = models.FULL["round-7b"], models.FULL["round-tiny"]
    assert len(big.layers) == 224 and sum(m * n for _, m, n in big.layers) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert len(tiny.layers) == 22 * 7 and len(tiny.ranks) == 16


def test_flop_counts_of_textbook_cases() -> None:
    n = 100
    assert costs.qr_flops(n, n) == pytest.approx(8 / 3 * n**3)  # 4/3 to reduce, 4/3 for Q
    assert costs.qr_flops(10 * n, n) == pytest.approx(4 * 10 * n**3 - 4 / 3 * n**3)
    assert costs.full_svd_flops(n, n) == 22 * n**3
    assert costs.full_svd_flops(10 * n, n) == costs.full_svd_flops(n, 10 * n) == 80 * n**3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_work(name: str) -> None:
    work = costs.method_work(name, costs.layer_of(SLIM), "gram", 4)
    assert work is not None and min(work) > 0


@pytest.mark.parametrize("R", [30, 4000])
def test_every_solver_has_its_work(R: int) -> None:
    from flexlora_fast.lowrank.plan import SOLVERS

    layer = costs.Layer(200, 300, R, 16, 10)
    for solver in SOLVERS:
        work = costs.solver_work(layer, solver, 4)
        assert work is not None and min(work) > 0, solver


def test_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    assert LIMITS.floor(1e11, 1e9) == 1.0
    assert LIMITS.floor(1e9, 1e10) == 1.0


def test_limits_are_measured() -> None:
    measured = machine.measure(64, 1 << 16)
    assert min(measured.matrix_float32, measured.matrix_bfloat16, measured.copy, measured.svd_float32) > 0


def test_what_is_not_run_says_why() -> None:
    device = next(w for w in FULL if w.name == "device")
    assert "GiB" in (layers.reason_not_to_run("PEFT add_weighted_adapter", device, LIMITS) or "")
    slow = Limits(1e11, 1e11, 1e10, 1e9)
    assert "predicted" in (layers.reason_not_to_run("dense + linalg.svd", device, slow) or "")
    assert layers.reason_not_to_run("dense + linalg.svd", SLIM, LIMITS) is None


def test_alternation_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    medians = layers.alternate(calls, {"a": 3, "b": 1, "c": 2}, pause=0)
    assert order == ["a", "b", "c", "a", "c", "a"]
    assert set(medians) == set("abc")


# -- other processes ---


def _allocate(size: int) -> Any:
    return lambda: int(torch.ones(size, dtype=torch.uint8)[::4096].sum())


def _endless() -> Any:
    import time

    return lambda: time.sleep(60)


def _broken() -> Any:
    return lambda: 1 / 0


def test_fresh_process_reports_peak_and_limits_time() -> None:
    with fresh.Fresh() as process:
        for size in (200 << 20, 50 << 20):  # the second peak must not be the first's
            process.prepare(_allocate, size)
            outcome = process.run()
            assert outcome.value > 0
            assert outcome.grown is None or abs(outcome.grown - size) < 8 << 20
        process.prepare(_broken)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            process.run()
        process.prepare(_endless)
        with pytest.raises(fresh.OverLimit):
            process.run(0.1)
        process.prepare(_allocate, 1 << 20)  # in a new process
        assert process.run().value > 0


def _stub_benchmark() -> Any:
    """As much of pytest-benchmark's fixture as ``layers.measure`` uses; under xdist the real one times nothing."""
    stub = SimpleNamespace(extra_info={}, stats=SimpleNamespace(stats=SimpleNamespace(data=[])))

    def pedantic(call: Any, *, setup: Any, rounds: int, warmup_rounds: int) -> Any:
        for _ in range(rounds):
            setup()
            stub.stats.stats.data.append(1e-3)
            value = call()
        return value

    stub.pedantic = pedantic
    return stub


def test_a_layer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: METHODS[name] for name in (OURS, "dense + linalg.svd", "PROPACK on the factors")}
    monkeypatch.setattr(layers, "METHODS", few)
    benchmark = _stub_benchmark()
    rows = layers.measure(benchmark, SLIM, LIMITS, turns=2, pause=0)
    info = json.loads(json.dumps(benchmark.extra_info))
    assert info["kind"] == "layer" and info["not_run"] == {} and info["shape"]["R"] == 16
    for name, row in rows.items():
        assert row["seconds"] > 0 and len(row["all_seconds"]) == 2, name
        assert row["excess"] < 1e-3 and row["flops"] > 0 and row["share"] > 0
    assert rows["PROPACK on the factors"]["steps"] > 0
    assert info["shape"]["tail"] == pytest.approx(
        float(torch.linalg.svdvals(dense(SLIM))[6:].norm() / dense(SLIM).norm())
    )


def test_regret_times_the_choice_and_what_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "REACH", 50.0)
    found = planner.regret(FAT, turns=2, pause=0)
    assert found.chosen in found.measured and len(found.measured) > 1
    assert found.value >= 1
    assert found.excess[found.chosen] <= planner.TOL
    assert json.loads(json.dumps(found.as_dict()))["regret"] == found.value


def test_excess_among_solvers() -> None:
    excess = planner.excess_of({"exact": 1.0, "loose": 2.0}, 100.0)
    assert excess == {"exact": 0.0, "loose": pytest.approx(2**0.5 - 1)}
    assert planner.excess_of({"exact": 0.0}, 100.0) == {"exact": 0.0}


# -- rounds on disk ---

SMALL = models.ModelRound("small", models.decoder(1, 24, 8, 40), (2, 4, 3))


def test_written_rounds_are_peft_folders_and_are_kept(tmp_path: Path) -> None:
    folders = models.write(SMALL, tmp_path)
    adapters = [ff.Adapter.load(folder) for folder in folders]
    assert [adapter.rank(adapter.layers[0]) for adapter in adapters] == [2, 4, 3]
    assert {name: (adapters[0].spec(name).m, adapters[0].spec(name).n) for name in adapters[0].layers} == {
        name: (m, n) for name, m, n in SMALL.layers
    }
    files = [folder / rounds.WEIGHTS for folder in folders]
    ranges = rounds.tensor_ranges(files[0])
    assert sum(length for file in files for _, length in rounds.tensor_ranges(file)) == SMALL.bytes
    assert max(offset + length for offset, length in ranges) == files[0].stat().st_size
    written = files[0].stat().st_mtime_ns
    models.write(SMALL, tmp_path)
    assert files[0].stat().st_mtime_ns == written
    assert sum(rounds.prepare_reads(folders, threads)() for threads in (1, 2)) == 2 * SMALL.bytes
    rounds.drop_pages(folders)
    assert rounds.prepare_reads(folders, 1)() == SMALL.bytes


def test_a_round_runs_from_files_to_a_file(tmp_path: Path) -> None:
    folders, weights = models.write(SMALL, tmp_path), SMALL.weights()
    for read in ("add", "finish"):
        out = tmp_path / f"{read}.safetensors"
        found = rounds.prepare_round(folders, weights, SMALL.k, "1GiB", read, out)()
        assert 0 < found["last_client_seconds"] <= found["seconds"]
        assert set(found["layers"]) == {name for name, _, _ in SMALL.layers}
        update, expected = ff.GlobalUpdate.load(out), ff.aggregate(folders, weights, rank=SMALL.k, progress=False)
        layer = SMALL.layers[0][0]
        torch.testing.assert_close(update[layer].S, expected[layer].S)
    assert rounds.prepare_in_memory(folders, weights, SMALL.k, SMALL.layers[0][0])() > 0


def test_compute_floor_is_the_flops_over_the_rate() -> None:
    chosen = {name: ("gram", 0) for name, _, _ in SMALL.layers}
    flops = sum(costs.solver_work(costs.Layer(m, n, 9, 4, 3), "gram", 0)[0] for _, m, n in SMALL.layers)
    assert rounds.compute_floor(SMALL, chosen, LIMITS) == pytest.approx(flops / LIMITS.matrix_float32)
    assert rounds.compute_floor(SMALL, {SMALL.layers[0][0]: ("unheard of", 0)}, LIMITS) is None


def test_trained_adapters_are_found(tmp_path: Path) -> None:
    assert trained.Trained.find(tmp_path) is None
    folders = models.write(SMALL, tmp_path)
    clients = tmp_path / "seed-0" / "round-02" / "clients"
    clients.mkdir(parents=True)
    for folder in folders:
        folder.rename(clients / folder.name)
    found = trained.Trained.find(tmp_path / "seed-0")
    assert found is not None and found.ranks == (2, 4, 3) and found.k == 4
    answer = Answer(*METHODS[OURS](found.clients(), found.k)())
    assert Truth(found.clients()).excess(answer.B, answer.A, found.k) < 1e-3
    assert stack_of(found.clients()).R == found.R


def test_the_suite_runs_and_its_file_tells_no_host(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--quick"]
    command += ["--data", str(tmp_path), "-k", "sweep and width", f"--benchmark-json={out}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["quick"] is True
    assert set(results["machine_info"]) == {
        *("cpu", "isa", "threads", "system", "python", "packages", "limits", "limits_after")
    }
    assert set(results["commit_info"]) == {"id"}
    (row,) = (benchmark["extra_info"] for benchmark in results["benchmarks"])
    assert row["axis"] == "width" and set(row["seconds"][OURS]) == {"64", "256"}


@pytest.mark.skipif(_native.extension is None, reason=f"no native extension: {_native.reason}")
def test_gathering_is_measured_against_plain_ways(tmp_path: Path) -> None:
    rows = gathering.measure(clients=5, slot=1 << 18, threads=2, folder=tmp_path)
    staged = [row for row in rows if row["name"].startswith("staged")]
    assert len(staged) == 7 and all(row["seconds"] > 0 for row in rows)
    assert [row["tensors"] for row in staged] == [20, 10, 20, 10, 20, 20, 20]
    assert len(list(tmp_path.iterdir())) == 5
    table = gathering.table(rows)
    assert table.count("\n") == 1 + len(rows) and "| plain reads, 2 threads |" in table


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained")
def test_the_merge_is_measured_beside_pefts() -> None:
    row = peft_merge.measure(peft_merge.Case("tiny", 40, 30, (2, 3), rslora=True), repeats=1)
    theirs, ours = map(float, row[3:5])
    assert ours < 1e-5 < theirs  # PEFT 0.21 forgets rsLoRA's √r
