"""What the GPU gate's records are held against, and the tables made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from benchmarks.gpu import commit, table, targets
from benchmarks.text import Check

ROOT = Path(__file__).parents[1]


def results(seconds: float = 0.030, share: float = 0.8, **row: Any) -> dict[str, Any]:
    """A made-up full run."""
    found = {
        "layers": 224,
        "k": 64,
        "bytes": 8e9,
        "seconds": seconds,
        "floor_seconds": 0.0135,
        "identical": True,
        "excess": {"a": 1e-6, "b": 5e-4},
        "small": {"share": 0.2, "seconds": 0.0055},
        "peak_bytes": 2**30,
    }
    streamed = found | {
        "from": "host memory",
        "bytes": 8e10,
        "seconds": 1.6,
        "floor_seconds": 1.455,
        "over_floor": 1.6 / 1.455,
        "take_in_seconds": 9.0,
        "reserved_bytes": 2 * 2**30,
        "limit": 16 * 2**30,
        "solvers": {"dense": 224},
    }
    timeline = {"layers": 28, "clients": 1000, "bytes": 1e10, "seconds": 0.2, "copy_seconds": 0.18}
    timeline |= {"kernel_seconds": 0.05, "copies_overlapped": 0.26, "kernels_overlapped": 0.95, "idle": 0.05}
    eigen = {"seconds": 0.004, "scaled": False, "error": 1e-15}
    skew = {"1e+02": 1e-8, "1e+04": 1e-8, "1e+06": 3e-8}
    solvers = {
        "matrices": 224,
        "eigen": [
            {"columns": 80, "by": {"cusolver": eigen, "torch": eigen | {"scaled": True}}, "not_run": {}},
            {"columns": 96, "by": {"cusolver": eigen | {"error": 1e-3}}, "not_run": {"torch": "no time left"}},
        ],
        "panels": {"count": 64, "rows": 4096, "columns": 80},
        "orthonormal": [
            {"by": name, "seconds": 1e-3, "skew": skew} for name in ("reference.orthonormalize", "torch.linalg.qr")
        ],
        "not_run": {"cuda.jacobi_eigh": "there is no extension"},
    }
    op = {"op": "project", "by": "kernels", "factors": "bfloat16", "precision": "bf16x3", "seconds": 1e-3}
    method = {"seconds": 0.002, "excess": 1e-6}
    layer = {
        "workload": "silo",
        "shape": {"m": 8, "n": 9, "R": 7},
        "methods": {"flexlora_fast": method, "peer": {"seconds": 0.02, "excess": 0.01}},
        "not_run": {"other": "needs 20 GiB"},
    }
    data = {
        "ceilings": {
            "machine": {"device": "NVIDIA H200", "torch": "2.11.0"},
            "copy": 4.3e12,
            "bf16": 7.9e14,
            "pcie": {"to_device": 5.5e10, "to_host": 5.4e10},
        },
        "round": {targets.ROUND: found | row},
        "streamed": {
            "rounds": {targets.STREAMED: streamed},
            "timeline": timeline | {"picture": table.PICTURE},
            "not_run": {"100 x r16, files": "predicted 90 s, 3 s left"},
        },
        "solvers": solvers,
        "loop": {targets.ROUND: {"total_seconds": 45.0}},
        "layers": {"layers": [layer]},
        "roofline": {
            "rows": [
                op | {"width": 16, "bound": "copy", "share": share},
                op | {"width": 256, "bound": "bf16", "share": share - 0.15},
            ]
        },
        "ncu": {"launches": [{"kernel": "contract_kernel", "seconds": 1e-3, "dram_share": 0.8}]},
    }
    return {
        "kind": "gpu",
        "quick": False,
        "commit_info": {"id": "abc1234", "source": "git"},
        "stages": {
            name: {"outcome": "passed", "reason": "", "seconds": 3.0, "data": found} for name, found in data.items()
        },
    }


def verdicts(run: dict[str, Any]) -> dict[str, Check]:
    return {check.name.removeprefix("round-7b, 100 x r16, k 64: "): check for check in targets.checks(run)}


def test_targets_say_what_was_reached() -> None:
    found = verdicts(results())
    assert all(check.reached for check in found.values()), found
    assert found["all layers, factors resident"].measured == "30 ms (floor 13.5 ms)"
    assert found["over the authors' loop on this GPU"].measured.startswith("1,500×")
    assert found["project, bf16x3, 256 columns"].measured == "65 % of bf16"
    assert found["small problems"].measured == "5.5 ms"
    assert found["round-7b, 1,000 x r16, from host memory: over PCIe"].measured == "1.1× (1.6 s; floor 1.46 s)"
    assert found["round-7b, 1,000 x r16, streamed: memory of the device"].measured == "1,024 MiB"
    assert found["orthonormality at condition 1e6, reference.orthonormalize"].measured == "3.0e-08"


def test_targets_say_what_was_missed() -> None:
    bad = {"excess": {"a": 2e-3}, "small": {"share": 0.4, "seconds": 0.02}, "identical": False}
    run = results(seconds=0.05, share=0.7, **bad)
    streamed, solvers = (run["stages"][name]["data"] for name in ("streamed", "solvers"))
    streamed["rounds"][targets.STREAMED] |= {"over_floor": 1.2, "peak_bytes": 17 * 2**30, "excess": {"a": 2e-3}}
    own = {"by": "cuda.orthonormalize", "seconds": 1e-4, "skew": {"1e+06": 2e-5}}  # counts before the reference
    solvers["orthonormal"].append(own)
    found = verdicts(run)
    assert found["orthonormality at condition 1e6, cuda.orthonormalize"].measured == "2.0e-05"
    assert all(check.reached is False for check in found.values()), found


def test_what_was_not_measured_is_no_verdict() -> None:
    empty = results() | {"stages": {}}
    assert [check.reached for check in targets.checks(empty)] == [None] * 10
    partly = results()
    partly["stages"]["loop"]["data"] = {}
    partly["stages"]["streamed"]["data"] = {"rounds": {}, "not_run": {targets.STREAMED: "predicted 90 s, 40 s left"}}
    partly["stages"]["round"]["data"][targets.ROUND]["small"] = {"share": None, "why": "no call was seen"}
    found = verdicts(partly)
    assert found["over the authors' loop on this GPU"].reached is None
    assert found["share of small problems"].measured == found["small problems"].measured == "no call was seen"
    over = found["round-7b, 1,000 x r16, from host memory: over PCIe"]
    assert (over.reached, over.measured) == (None, "predicted 90 s, 40 s left")


def test_tables_show_every_row_and_every_absence() -> None:
    run = results()
    text = table.section(run)
    for words in ("abc1234", "NVIDIA H200", "4.3 TB/s", "790 Tflop/s", "55 / 54 GB/s", "needs 20 GiB", "(10×)"):
        assert words in text, words
    assert "excess 1e-02" in text and "1,500×" in text and "contract_kernel" in text
    for words in ("1.46 s (1.1×)", "16,384 MiB", "dense 224", "Not run: 100 x r16, files: predicted 90 s"):
        assert words in text, words
    assert "180 ms, 26 % of that under kernels; kernels for 50 ms, 95 % of that under copies" in text
    assert "](benchmarks/results/h200/timeline.png)" in text
    for words in ("| torch | 4 ms* | no time left |", "4 ms, off by 1e-03", "of 8 matrices, times the rest"):
        assert words in text, words
    assert "Not run: cuda.jacobi_eigh: there is no extension." in text and "64 panels of 4096×80" in text
    for part in (table.layer_table(run), table.op_table(run), table.stage_table(run), table.round_table(run)):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert "| round | passed | 3 s |" in table.summary(run)
    unknown = run | {"commit_info": {"id": "unknown", "source": commit.REMEDY}}
    assert commit.VARIABLE in table.summary(unknown) and not table.is_full(unknown)
    assert table.is_full(run) and not table.is_full(run | {"quick": True})


def test_results_are_kept_by_the_gpus_name() -> None:
    assert table.folder_of(results()) == table.RESULTS.parent
    assert table.folder_of(results() | {"stages": {}}) is None


def test_readme_holds_what_the_results_say_and_nothing_before_there_are_any() -> None:
    readme = (ROOT / table.README).read_text()
    assert readme.count(table.BEGIN) == readme.count(table.END) == 1
    file = ROOT / table.RESULTS
    if not file.is_file():
        assert f"{table.BEGIN}\n{table.END}\n" in readme
        return
    committed = json.loads(file.read_text())
    assert table.is_full(committed)
    assert table.splice(readme, table.section(committed)) == readme, "python -m benchmarks.gpu.table"
