"""The gate's streamed rounds and small problems, and its timelines, without a GPU: arithmetic, pictures, absences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.gpu import ops, sizes, solvers, streamed, timeline
from benchmarks.gpu.stage import NEEDS_GPU, Options, Report
from benchmarks.gpu.table import PICTURE
from benchmarks.gpu.timeline import IN, KERNEL, OUT, Span


def event(category: str, name: str, start: float, length: float, stream: int, **about: Any) -> dict[str, Any]:
    """As torch's profiler writes it, in microseconds."""
    about |= {"device": 0, "context": 1, "stream": stream, "correlation": 7}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 0,
        "tid": stream,
        "ts": start,
        "dur": length,
        "args": about,
    }


# Two copying streams and one that computes: 0 … 100 µs, of which 80 are spent copying and 50 computing, 40 on both.
TRACE = {
    "schemaVersion": 1,
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 990.0, "dur": 5.0, "args": {}},
        event("kernel", "contract_kernel", 1040.0, 30.0, 7, grid=[528, 1, 1]),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1000.0, 50.0, 13, bytes=2_000_000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1040.0, 40.0, 14, bytes=1_000_000),
        event("kernel", "gram_kernel", 1070.0, 20.0, 7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 1095.0, 5.0, 7, bytes=64),
        event("gpu_memset", "Memset (Device)", 1010.0, 1.0, 7, bytes=64),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1000.0, "id": 7},
    ],
}


def test_spans_are_read_off_a_trace() -> None:
    found = timeline.spans(TRACE)
    assert [(x.kind, x.stream) for x in found] == [(IN, 13), (KERNEL, 7), (IN, 14), (KERNEL, 7), (OUT, 7)]
    assert (found[0].start, found[0].bytes) == (0.0, 2_000_000)
    assert found[-1].end == pytest.approx(100e-6)
    assert timeline.spans({"traceEvents": []}) == []


def test_overlap_is_counted_once_whatever_the_streams() -> None:
    found = timeline.figures(timeline.spans(TRACE))
    expected = {"seconds": 100e-6, "copy_seconds": 80e-6, "kernel_seconds": 50e-6, "rate": 3e6 / 80e-6}
    expected |= {"copies_overlapped": 0.5, "kernels_overlapped": 0.8, "idle": 0.1}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert (found["copies"], found["kernels"], found["bytes"]) == (2, 2, 3_000_000)
    assert found["streams"] == {IN: 2, OUT: 1, timeline.OTHER: 0, KERNEL: 1}


@pytest.mark.parametrize(
    ("kernels", "share"), [([], 0.0), ([(0, 10)], 1.0), ([(3, 4), (20, 30)], 0.1), ([(-5, 1), (9, 99), (0, 1)], 0.2)]
)
def test_overlap_with_copies_of_ten_seconds(kernels: list[tuple[float, float]], share: float) -> None:
    spans = [Span(IN, 1, 0.0, 4.0, 1), Span(IN, 2, 4.0, 10.0, 1)]
    found = timeline.figures([*spans, *(Span(KERNEL, 3, *kernel) for kernel in kernels)])
    assert found["copies_overlapped"] == pytest.approx(share)
    assert (found["kernels_overlapped"] is None) == (not kernels)


def test_a_timeline_of_nothing_has_no_figures() -> None:
    found = timeline.figures([])
    assert found["copies_overlapped"] is found["kernels_overlapped"] is found["idle"] is found["rate"] is None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_has_a_lane_for_each_stream(tmp_path: Path, suffix: str) -> None:
    found = timeline.spans(TRACE)
    assert list(timeline.lanes(found)) == [(IN, 13), (IN, 14), (OUT, 7), (KERNEL, 7)]
    assert len(timeline.lanes(found)[KERNEL, 7]) == 1  # the two kernels touch
    out = tmp_path / f"timeline.{suffix}"
    timeline.picture(found, out, "round-7b, 1,000 clients")
    head = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert out.read_bytes().startswith(head) and out.stat().st_size > 5000


# -- streamed rounds ---


def test_the_large_round_is_the_one_that_is_aimed_at() -> None:
    small, large = sizes.streamed(quick=False).values()
    assert (len(small.ranks), len(large.ranks), len(large.layers)) == (100, 1000, 224)
    assert large.bytes == pytest.approx(8.0e10, rel=1e-2)
    assert streamed.floor_seconds(large, {"pcie": {"to_device": 5.5e10}}) == pytest.approx(1.45, rel=1e-2)
    assert streamed.floor_seconds(large, {"pcie": NEEDS_GPU}) is streamed.floor_seconds(large, {}) is None


def test_clients_share_what_was_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    round_ = next(iter(sizes.streamed(quick=True).values()))
    states = streamed.drawn(round_, 4, "cpu")
    made = streamed.adapters(round_, states)
    assert len(states) == 4 and len(made) == 6 and made[4] is made[0]
    with streamed.folders(round_, states[:2]) as paths:
        for i, path in enumerate(paths):
            stored = load_file(path / "adapter_model.safetensors")
            assert all(torch.equal(stored[key], tensor) for key, tensor in states[i % 2].items())
        assert len(paths) == 6 and paths[0].stat().st_dev == paths[5].stat().st_dev
        assert (paths[4] / "adapter_model.safetensors").samefile(paths[0] / "adapter_model.safetensors")
    assert not paths[0].exists()


def test_a_part_of_a_round_has_its_first_blocks() -> None:
    round_ = next(iter(sizes.streamed(quick=True).values()))
    states = streamed.drawn(round_, 2, "cpu")
    some, few = streamed.part(round_, states, 1)
    assert len(some.layers) == 7 and {name.split(".")[2] for name, _, _ in some.layers} == {"0"}
    assert [len(state) for state in few] == [14, 14]
    assert all(few[0][key] is states[0][key] for key in few[0])
    assert streamed.part(round_, states, 2)[0] == round_


def test_a_larger_round_is_predicted_by_its_bytes(tmp_path: Path) -> None:
    """From what a repeated run takes: compiling and pinning are paid for by then."""
    small, large = sizes.streamed(quick=False).items()
    report = Report(tmp_path / "r.json")
    row = {"bytes": small[1].bytes, "take_in_seconds": 1.0, "first_seconds": 20.0, "seconds": 0.2}
    report["rounds"] = {small[0]: row}
    assert streamed.predicted(report, small[0], large[1]) == pytest.approx(14.0)


def test_the_timeline_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's part in it made up: the round, and the trace of its second run."""
    asked: list[tuple[int, str, int]] = []

    def prepared(sources: Any, weights: Any, k: int, device: str, limit: int, read: str) -> Any:
        asked.append((len(sources), device, len(sources[0].layers)))
        return lambda: None

    monkeypatch.setattr(ops, "streamed_round", prepared)
    monkeypatch.setattr(timeline, "recorded", lambda call: (call(), TRACE)[1])
    round_ = list(sizes.streamed(quick=True).values())[1]
    report = Report(tmp_path / "streamed.json")
    options = Options("cuda", True, 60, tmp_path / "streamed.json")
    streamed.measure_timeline(round_, streamed.drawn(round_, 2, "cpu"), options, report)
    assert asked == [(20, "cuda", 7)]
    about = json.loads((tmp_path / "streamed.json").read_text())["timeline"]
    assert about["picture"] == PICTURE and (tmp_path / PICTURE).stat().st_size > 5000
    assert about["copies_overlapped"] == pytest.approx(0.5) and about["streams"][IN] == 2


def test_what_would_outlast_the_stage_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "predicted", lambda report, small, large: 500.0)
    report = Report(tmp_path / "streamed.json")
    streamed.measure(Options("cpu", True, 60, tmp_path / "streamed.json"), report)
    assert list(report["rounds"]) == ["6 x r4", "6 x r4, files"] and "timeline" not in report
    assert list(report["not_run"]) == ["timeline", "20 x r4"]
    assert all(why.startswith("predicted 500 s, ") for why in report["not_run"].values())
    assert "errors" not in report


# -- small problems ---


def test_panels_have_the_condition_that_they_are_called_by() -> None:
    for condition in solvers.CONDITIONS:
        values = torch.linalg.svdvals(solvers.panels((2, 300, 12), condition, "cpu").double())
        assert values[:, 0] / values[:, -1] == pytest.approx(condition, rel=1e-2)


def test_answers_are_held_against_their_matrices() -> None:
    C = solvers.symmetric(5, 7, "cpu")
    assert torch.equal(C, C.mT) or (C - C.mT).abs().max() < 1e-15
    values, vectors = torch.linalg.eigh(C)
    assert solvers.residual(C, values, vectors) < 1e-14
    assert solvers.residual(C, values.flip(1), vectors.flip(2)) < 1e-14  # in either order
    assert solvers.residual(C, values.flip(1), vectors) > 1e-3
    Q = torch.linalg.qr(solvers.panels((2, 40, 6), 1e2, "cpu"))[0]
    assert solvers.skew(Q) < 1e-6
    Q[1, :, 2] *= 1.001
    assert solvers.skew(Q) == pytest.approx(2e-3, rel=1e-2)


def test_long_batches_are_scaled_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    C = solvers.symmetric(32, 3, "cpu")
    seen: list[int] = []

    def solver(X: torch.Tensor) -> Any:
        seen.append(len(X))
        return torch.linalg.eigh(X)

    monkeypatch.setattr(solvers, "timed", lambda call, device: (call(), 0.01 * seen[-1])[1])
    row = solvers.eigen_row(ops.TORCH_EIGH, solver, C, "cpu")
    assert row["scaled"] and row["seconds"] == pytest.approx(0.32) and set(seen) == {8}
    assert not solvers.eigen_row("other", solver, C, "cpu")["scaled"] and seen[-1] == 32
    monkeypatch.setattr(solvers, "_LONG", 1.0)
    row = solvers.eigen_row(ops.TORCH_EIGH, solver, C, "cpu")
    assert not row["scaled"] and row["seconds"] == pytest.approx(0.32) and row["error"] < 1e-14


def test_an_extension_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.of_extension("jacobi_eigh", "cpu") == NEEDS_GPU
    monkeypatch.setattr(ops, "LAUNCHER", "flexlora_fast.backends.nowhere")
    assert ops.of_extension("jacobi_eigh", "cuda") == "there is no flexlora_fast.backends.nowhere"
    monkeypatch.setattr(ops, "CUDA", "flexlora_fast.backends.small")
    monkeypatch.setattr(ops, "extension_obstacle", lambda device: None)
    assert ops.of_extension("jacobi_eigh", "cuda") == "flexlora_fast.backends.small has no jacobi_eigh"
    assert callable(ops.of_extension("whiten", "cuda"))
    monkeypatch.setattr(ops, "extension_obstacle", lambda device: "built without nvcc")
    assert ops.of_extension("whiten", "cuda") == "built without nvcc"


def test_the_engine_streams_through_the_limit_that_it_is_given() -> None:
    round_ = models.ModelRound("round-7b", models.decoder(1, 64, 64, 172), (4,) * 3)
    states = streamed.drawn(round_, 3, "cpu")
    sources = streamed.adapters(round_, states)
    finish = ops.streamed_round(sources, round_.weights(), 8, "cpu", 1 << 24, "add")
    assert finish.__self__.memory_limit == 1 << 24  # type: ignore[attr-defined]
    assert [client.name for client in finish().clients] == ["client-00000", "client-00001", "client-00002"]
