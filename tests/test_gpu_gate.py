"""The GPU gate without a GPU: its stages at small sizes, its records and formulas."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import models
from benchmarks.gpu import commit, gate, roofline, sizes, stage, table, targets
from benchmarks.gpu import round as rounds

ROOT = Path(__file__).parents[1]


# -- the whole of it, at small sizes ---


@pytest.mark.slow  # 90 s of processes that measure; each stage has tests of its own
def test_a_quick_run_on_the_cpu_measures_what_needs_no_gpu(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    asked = ["build", "ceilings", "round", "streamed", "solvers", "loop", "layers", "roofline", "sanitize"]
    command = [sys.executable, "-m", "benchmarks.gpu.gate", "--quick", "--device", "cpu", "--work", str(tmp_path / "w")]
    done = subprocess.run(
        [*command, "--stages", *asked],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "w" / table.NAME).read_text())
    assert json.loads((tmp_path / "out" / table.NAME).read_text())["stages"].keys() == results["stages"].keys()
    assert "===== round" in (tmp_path / "out" / "gate.log").read_text()
    outcomes = {name: record["outcome"] for name, record in results["stages"].items()}
    assert list(outcomes) == asked
    assert {name for name, outcome in outcomes.items() if outcome == "skipped"} == {"build", "sanitize"}
    assert results["stages"]["sanitize"]["reason"] == stage.NEEDS_GPU
    assert results["quick"] and results["commit_info"]["id"]

    ceilings = targets.data(results, "ceilings")
    assert min(ceilings[key] for key in ("copy", "bf16", "float32", "float64", "svd_float32")) > 0
    assert ceilings["pcie"] == ceilings["tf32"] == stage.NEEDS_GPU
    for row in targets.data(results, "round").values():
        assert row["identical"] and max(row["excess"].values()) <= 1e-3
        assert row["seconds"] > 0 and row["floor_seconds"] > 0 and row["small"]["why"] == stage.NEEDS_GPU
    streamed = targets.data(results, "streamed")
    assert streamed["drawn"] == 4 and streamed["not_run"] == {}
    assert {name: row["from"] for name, row in streamed["rounds"].items()} == {
        "6 x r4": "host memory",
        "6 x r4, files": "files",
        "20 x r4": "host memory",
    }
    for row in streamed["rounds"].values():
        assert row["identical"] and max(row["excess"].values()) <= 1e-3 and row["seconds"] > 0
        assert row["floor_seconds"] is row["over_floor"] is row["peak_bytes"] is None
    about = streamed["timeline"]
    assert (about["not_run"], about["layers"], about["clients"]) == (stage.NEEDS_GPU, 7, 20)
    solvers = targets.data(results, "solvers")
    assert {"cuda.jacobi_eigh", "cuSOLVER XsyevBatched", "cupy.linalg.eigh"} <= solvers["not_run"].keys()
    for row in solvers["eigen"]:
        assert row["by"]["torch.linalg.eigh"]["error"] <= 1e-12 and not row["not_run"]
    assert {row["by"] for row in solvers["orthonormal"]} == {"reference.orthonormalize", "torch.linalg.qr"}
    assert all(list(row["skew"]) == ["1e+02", "1e+04", "1e+06"] for row in solvers["orthonormal"])
    assert targets.orthonormal_check(results).reached
    loop = targets.data(results, "loop")
    assert loop.pop("pilot_flops_per_second") > 0 and loop.keys() == targets.data(results, "round").keys()
    for row in loop.values():
        assert row["total_seconds"] == pytest.approx(sum(x["seconds"] * x["count"] for x in row["layers"].values()))
        assert sum(x["count"] for x in row["layers"].values()) == 14
    for row in targets.data(results, "layers")["layers"]:
        assert row["not_run"] == {"dense + cupy.linalg.svd": stage.NEEDS_GPU}
        exact = row["methods"]["FlexLoRA authors' loop"]
        assert exact["excess"] < 1e-4 and row["methods"]["flexlora_fast"]["excess"] <= 1e-3
    rows = targets.data(results, "roofline")["rows"]
    assert {row["op"] for row in rows} == {"project", "project_t", "gram", "materialize", "pack"}
    assert targets.data(results, "roofline")["not_run"] == {"kernels": stage.NEEDS_GPU}
    for text in (table.summary(results), table.section(results)):
        assert (
            "6 x r4" in text
            and "files" in text
            and "12 eigenproblems" in text
            and "not measured" in text
            and "reached" in text
        )
    assert "results: " in done.stdout and "| round | passed |" in done.stdout


def test_a_full_run_without_a_gpu_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gate.parse(["--device", "cpu"])
    assert "--quick --device cpu" in capsys.readouterr().err


# -- stages that go wrong ---


@dataclasses.dataclass(frozen=True)
class Scripted(gate.Stage):
    """A stage that is a few lines of Python, given its report as ``sys.argv[1]``."""

    code: str = ""

    def command(self, python: str, seconds: float, given: Any, report: Path) -> list[str]:
        return [python, "-c", textwrap.dedent(self.code), str(report)]


REPORTS = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'x': 1})); "


def run(tmp_path: Path, *stages: gate.Stage, total: float = 60) -> dict[str, Any]:
    given = gate.parse(["--quick", "--device", "cpu", "--work", str(tmp_path), "--total", str(total)])
    return gate.run_all(given, stages)


def test_a_failing_stage_is_recorded_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    results = run(
        tmp_path,
        Scripted("fails", 20, "", code=REPORTS + "raise SystemExit('out of luck')"),
        Scripted("skips", 20, "", code=REPORTS.replace("'x': 1", "'skipped': 'no card'")),
        Scripted("works", 20, "", code=REPORTS),
    )
    found = {name: (record["outcome"], record["reason"]) for name, record in results["stages"].items()}
    assert found["fails"] == ("failed", "exit code 1: out of luck")
    assert found["skips"] == ("skipped", "no card") and found["works"] == ("passed", "")
    assert results["stages"]["fails"]["data"] == {"x": 1} and results["stages"]["fails"]["tail"] == ["out of luck"]
    monkeypatch.setattr(gate, "run_all", lambda given, stages: results)
    assert gate.main(["--quick", "--device", "cpu", "--results", str(tmp_path / "r.json")]) == 1
    assert json.loads((tmp_path / "r.json").read_text())["stages"] == results["stages"]


def test_a_hanging_stage_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """What it reported before stays; the process it started is gone as well."""
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); "
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    results = run(tmp_path, Scripted("hangs", 3, "", code=REPORTS + child + deaf), Scripted("works", 20, "", REPORTS))
    assert time.monotonic() - start < 20
    hung = results["stages"]["hangs"]
    assert (hung["outcome"], hung["reason"], hung["data"]) == ("failed", "stopped at its limit of 3 s", {"x": 1})
    pid = int(hung["tail"][0])
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert results["stages"]["works"]["outcome"] == "passed"


def test_no_stage_starts_when_the_time_is_up(tmp_path: Path) -> None:
    results = run(tmp_path, Scripted("late", 20, "", REPORTS), total=0.5)
    assert results["stages"]["late"]["reason"] == "no time left of 0 s"


def test_a_picture_is_kept_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of an earlier run is not taken for this one's."""
    draws = "from pathlib import Path; Path(sys.argv[1]).with_name('timeline.png').write_text('drawn')"
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    made = run(tmp_path / "work", Scripted("streamed", 20, "", REPORTS + draws))
    assert (tmp_path / "out" / table.PICTURE).read_text() == "drawn"
    gate.write(made, tmp_path / "kept" / table.NAME, tmp_path / "work")
    assert (tmp_path / "kept" / table.PICTURE).read_text() == "drawn"
    run(tmp_path / "work", Scripted("streamed", 20, "", REPORTS))
    assert not (tmp_path / "work" / table.PICTURE).exists()


def test_boxes_leave_time_for_the_tests() -> None:
    assert sum(s.seconds for s in gate.STAGES if s.name != "tests") <= gate.TOTAL - 30
    assert gate.STAGES[-1].name == "tests"


def test_what_pytest_says_is_counted() -> None:
    output = "...F\nFAILED tests/test_a.py::test_b[x] - AssertionError: off\nERROR tests/test_c.py\n"
    output += "1 failed, 30 passed, 2 skipped, 1 error in 3.4s\n"
    found = gate.pytest_counts(output)
    assert found["counts"] == {"failed": 1, "passed": 30, "skipped": 2, "error": 1}
    assert found["failed"] == ["tests/test_a.py::test_b[x] - AssertionError: off", "tests/test_c.py"]


# -- the commit ---


def test_the_commit_is_found_or_called_unknown(tmp_path: Path) -> None:
    assert commit.find(tmp_path, {}) == (commit.UNKNOWN, commit.REMEDY)
    (tmp_path / commit.FILE).write_text("f00\n")
    assert commit.find(tmp_path, {}) == ("f00", "COMMIT")
    assert commit.find(tmp_path, {commit.VARIABLE: "abc1234"}) == ("abc1234", commit.VARIABLE)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_tree_itself(tmp_path: Path) -> None:
    """Not of a repository that the copy lies in; and marked where files differ from it."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    clean = commit.find(tmp_path, {commit.VARIABLE: "other"})
    assert clean.source == "git" and len(clean.id) >= 7
    (tmp_path / "file").write_text("2")
    assert commit.find(tmp_path, {}).id == clean.id + "-dirty"
    copy = tmp_path / "copy"
    copy.mkdir()
    assert commit.find(copy, {}).id == commit.UNKNOWN


# -- formulas ---


def test_work_of_the_ops() -> None:
    size = (2, 10, 20, 5)
    assert roofline.work("project", size, 3, 2, 4) == (2 * 2 * 30 * 5 * 3, 2 * (2 * 30 * 5 + 4 * 20 * 3 + 4 * 10 * 3))
    assert roofline.work("project_t", size, 3, 2, 4)[1] == 2 * (2 * 30 * 5 + 4 * 10 * 3 + 4 * 20 * 3)
    assert roofline.work("gram", size, 3, 2, 4) == (2 * 30 * 25, 2 * (2 * 30 * 5 + 8 * 25))
    assert roofline.work("materialize", size, 3, 2, 4) == (2 * 2 * 200 * 5, 2 * (2 * 30 * 5 + 4 * 200))
    assert roofline.work("pack", size, 3, 2, 4) == (0, 2 * 2 * 2 * 30 * 5)
    with pytest.raises(ValueError, match="'svd' has no formula"):
        roofline.work("svd", size, 3, 2, 4)


def test_an_op_is_held_against_what_bounds_it() -> None:
    ceilings = {"copy": 1e12, "bf16": 1e14}
    streams = roofline.placed("project", "bf16", 1e9, 1e9, 2e-3, ceilings)
    assert (streams["bound"], streams["share"]) == ("copy", pytest.approx(0.5))
    thrice = roofline.placed("project", "bf16x3", 1e11, 1e9, 6e-3, ceilings)
    assert (thrice["bound"], thrice["share"]) == ("bf16", pytest.approx(0.5))
    gram = roofline.placed("gram", "bf16x3", 1e11, 1e9, 2e-3, ceilings)  # exact in one product
    assert (gram["bound"], gram["share"]) == ("copy", pytest.approx(0.5))
    assert roofline.placed("project", "tf32", 1.0, 1.0, 1.0, ceilings)["share"] is None


def test_the_floor_of_the_round_is_the_published_one() -> None:
    """13.5 ms for rank 16, k = 64, at 4.3 TB/s and 790 Tflop/s; R = 1600 over all layers of Llama-2-7B."""
    round_ = sizes.rounds(quick=False)[targets.ROUND]
    assert len(round_.layers) == 224 and round_.bytes == pytest.approx(8.0e9, rel=1e-2)
    floor = rounds.floor_seconds(round_, 64, {"copy": 4.3e12, "bf16": 7.9e14})
    assert floor == pytest.approx(13.5e-3, rel=1e-2)
    assert rounds.floor_seconds(round_, 64, {}) is None
    shapes = sizes.one_of_each(round_)
    assert {shape: count for shape, (_, count) in shapes.items()} == {
        (4096, 4096): 128,
        (11008, 4096): 64,
        (4096, 11008): 32,
    }


def test_factors_are_drawn_as_the_files_of_the_cpu_suite(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    round_ = next(iter(sizes.rounds(quick=True).values()))
    folders = models.write(round_, tmp_path)
    for folder, state in zip(folders, models.drawn(round_), strict=True):
        stored = load_file(folder / "adapter_model.safetensors")
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[key], tensor) for key, tensor in state.items())
