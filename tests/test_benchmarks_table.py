"""What the benchmark suite says about its results: targets, tables, plots, and the README's copy of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from benchmarks import planner, plots, table, targets
from benchmarks.peers import OURS
from benchmarks.workloads import FULL
from flexlora_fast.lowrank import plan

ROOT = Path(__file__).parents[1]


def method(seconds: float, excess: float = 0.0) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "excess": excess,
        "peak_bytes": 2**20,
        "flops": 1e9,
        "bytes": 1e6,
        "share": 0.5,
        "solver": "gram",
    }


def layer(name: str, own: float, peers: dict[str, dict[str, Any]], own_excess: float = 0.0) -> dict[str, Any]:
    shape = {"m": 8, "n": 9, "R": 7, "k": 2, "spectrum": "decay", "clients": 3, "ranks": [1, 2, 4], "tail": 0.1}
    absent = {peer: "needs 20 GiB" for peer in table.PEERS if peer not in peers}
    methods = {OURS: method(own, own_excess)} | peers
    return {"kind": "layer", "workload": name, "shape": shape, "methods": methods, "not_run": absent}


def results() -> dict[str, Any]:
    """A made-up run: silo reaches both of its targets, device only that over the full SVD."""
    state = {
        "seconds": 14.0,
        "last_client_seconds": 13.0,
        "peak_bytes": 2**30,
        "read_floor": 4.0,
        "compute_floor": 10.0,
    }
    infos = [
        layer("silo", 0.01, {targets.DENSE: method(5.0), "QR + QR + core SVD": method(0.05)}),
        layer("device", 0.01, {targets.DENSE: method(1.6), "two-stage sketch": method(0.001, 0.1)}, 5e-4),
        {
            "kind": "round",
            "workload": "round-7b",
            "layers": 224,
            "clients": 100,
            "bytes": 8e9,
            "states": {"cold": {**state, "seconds": 16.0}, "warm": state},
            "in_memory_seconds": 13.0,
        },
        {
            "kind": "scale",
            "memory_limit": "1GiB",
            "shape": {"m": 8, "n": 8, "r": 2},
            "points": {"10": state, "1000": state},
        },
        {"kind": "planner", "workload": "silo", "chosen": "gram", "best": "dense", "regret": 1.7},
        {"kind": "sweep", "axis": "rank", "seconds": {OURS: {"2": 0.1, "4": 0.2}, targets.DENSE: {}}},
    ]
    limits = {"matrix_float32": 1e11, "matrix_bfloat16": 1e11, "copy": 1e10}
    about = {"cpu": "x", "isa": "y", "threads": 2, "packages": {"torch": "2"}, "limits": limits}
    return {
        "benchmarks": [{"extra_info": info} for info in infos],
        "quick": False,
        "machine_info": about,
        "commit_info": {"id": "abc"},
    }


def test_targets_say_what_was_reached_and_what_not() -> None:
    found = {check.name: check for check in targets.checks(results())}
    assert found["silo: over dense + linalg.svd"][2:] == ("500×", True)
    assert found["silo: over the fastest peer as accurate"].reached
    assert found["device: over dense + linalg.svd"].reached
    # The sketch is faster, but it is not as accurate: the full SVD is what there is to beat.
    assert found["device: over the fastest peer as accurate"].measured == "160× (dense + linalg.svd)"
    assert found["flat: over dense + linalg.svd"].reached is None
    assert found["round-7b, cold: wall"].reached is False
    assert found["round-7b, warm: wall"].reached is True
    assert found["round-7b: peak resident memory"].reached is True
    assert found["round-7b, warm: a layer against the in-memory path"].reached is True
    assert found["planner: time of its choice over the best solver's, worst workload"].reached is False


def test_targets_of_an_empty_run_are_not_measured() -> None:
    empty = results() | {"benchmarks": []}
    assert all(check.reached is None for check in targets.checks(empty))


def test_a_faster_peer_of_the_same_accuracy_is_a_miss() -> None:
    run = results()
    run["benchmarks"][0]["extra_info"]["methods"]["QR + QR + core SVD"] = method(0.005, 9e-7)
    (check,) = (c for c in targets.checks(run) if c.name == "silo: over the fastest peer as accurate")
    assert check.reached is False and check.measured.startswith("0.5×")


def test_a_round_of_bfloat16_is_held_against_the_rate_of_bfloat16() -> None:
    run = results()
    run["machine_info"]["limits"]["matrix_bfloat16"] = 4e11
    assert targets.compute_floor(run, {"compute_floor": 12.0}) == 3.0
    assert targets.compute_floor(run, {"compute_floor": None}) is None


def test_section_shows_every_row_and_every_absence() -> None:
    text = table.section(results())
    for words in ("*silo*", "*device*", "not run: needs 20 GiB", "excess 1e-01", "*round-7b*", "1,000", "**no**"):
        assert words in text, words
    widths = {line.count("|") for line in table.layer_table(results()).splitlines()}
    assert len(widths) == 1


def test_splice_replaces_only_what_is_between_the_markers() -> None:
    before = f"top\n{table.BEGIN}\nold\n{table.END}\nbottom\n"
    after = table.splice(before, "new")
    assert after == f"top\n{table.BEGIN}\nnew\n{table.END}\nbottom\n"
    assert table.splice(after, "new") == after


def test_plots_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    plots.plot(copy.deepcopy(results()), out)
    assert out.stat().st_size > 10_000


def test_readme_holds_what_the_results_say() -> None:
    committed = json.loads((ROOT / table.RESULTS).read_text())
    readme = (ROOT / table.README).read_text()
    assert readme.count(table.BEGIN) == readme.count(table.END) == 1
    assert table.is_suite(committed)
    assert table.splice(readme, table.section(committed)) == readme, "python -m benchmarks.table"


def test_the_planner_is_within_half_of_the_best_solver_on_every_workload() -> None:
    """Its choices of today against the committed times of all solvers: times taken beside other tests say nothing."""
    committed = json.loads((ROOT / table.RESULTS).read_text())
    measured = {row["workload"]: planner.Regret(**_fields(row)) for row in targets.rows(committed, "planner")}
    workloads = {workload.name: workload for workload in (*FULL, *planner.BETWEEN)}
    assert workloads.keys() <= measured.keys()
    for name, workload in workloads.items():
        found = measured[name]
        shape = plan.Shape(workload.m, workload.n, workload.R, workload.k, planner.TOL)
        chosen = plan.choose(shape)
        assert found.excess[chosen] <= planner.TOL, name
        assert found.measured[chosen] <= 1.5 * found.measured[found.best], f"{name}: {chosen}, not {found.best}"


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(planner.Regret)}
    return {key: value for key, value in row.items() if key in names}
