"""What was set out to be reached on a GPU, and what a run of the gate measured: from its results, misses included."""

from __future__ import annotations

from typing import Any

from benchmarks.text import Check, mebibytes, seconds

Results = dict[str, Any]

ROUND = "100 x r16"
_LAYERS_SECONDS = 0.040
_EXCESS = 1e-3
_SMALL_SHARE = 0.25
_SMALL_SECONDS = 0.006
_OVER_AUTHORS = 1000
STREAMED = "1,000 x r16"
_OVER_PCIE = 1.15
# The largest ‖QᵀQ − I‖₂ of panels of the largest condition measured.
_SKEW, _CONDITION = 1e-5, "1e+06"
# What the engine makes panels orthonormal with, the fastest first.
_ORTHONORMAL = ("cuda.orthonormalize", "reference.orthonormalize")
# Of the measured copy bandwidth where an op streams, of the measured matrix rate where it computes.
_OF_COPY, _OF_MATRIX = 0.75, 0.60


def data(results: Results, stage: str) -> dict[str, Any]:
    """What a stage reported; empty where it did not."""
    return dict(results["stages"].get(stage, {}).get("data", {}))


def unmeasured(name: str, goal: str, why: str = "not measured") -> Check:
    return Check(name, goal, why, None)


def round_checks(results: Results) -> list[Check]:
    """Time, excess, small problems and repeatability of round-7b at rank 16, and its ratio to the authors' loop."""
    row = data(results, "round").get(ROUND, {})
    title = f"round-7b, {ROUND}, k {row.get('k', 64)}"
    small = [_small(title, row), _small_seconds(title, row)]
    return [_time(title, row), _excess(title, row), *small, _same(title, row), _ratio(results, title, row)]


def _time(title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: all layers, factors resident", f"≤ {seconds(_LAYERS_SECONDS)}"
    if "seconds" not in row:
        return unmeasured(name, goal)
    floor = row.get("floor_seconds")
    beside = f" (floor {seconds(floor)})" if floor else ""
    return Check(name, goal, seconds(row["seconds"]) + beside, row["seconds"] <= _LAYERS_SECONDS)


def _excess(title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: excess, worst of the layers looked at", f"≤ {_EXCESS:g}"
    if not row.get("excess"):
        return unmeasured(name, goal)
    worst = max(row["excess"].values())
    return Check(name, goal, f"{worst:.1e}", worst <= _EXCESS)


def _small(title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: share of small problems", f"≤ {100 * _SMALL_SHARE:.0f} %"
    small = row.get("small", {})
    if small.get("share") is None:
        return unmeasured(name, goal, small.get("why", "not measured"))
    return Check(name, goal, f"{100 * small['share']:.0f} %", small["share"] <= _SMALL_SHARE)


def _small_seconds(title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: small problems", f"≤ {seconds(_SMALL_SECONDS)}"
    small = row.get("small", {})
    if small.get("seconds") is None:
        return unmeasured(name, goal, small.get("why", "not measured"))
    return Check(name, goal, seconds(small["seconds"]), small["seconds"] <= _SMALL_SECONDS)


def _same(title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: two runs", "identical bit for bit"
    if "identical" not in row:
        return unmeasured(name, goal)
    return Check(name, goal, "identical" if row["identical"] else "different", row["identical"])


def _ratio(results: Results, title: str, row: dict[str, Any]) -> Check:
    name, goal = f"{title}: over the authors' loop on this GPU", f"≥ {_OVER_AUTHORS:,}×"
    loop = data(results, "loop").get(ROUND, {}).get("total_seconds")
    if loop is None or "seconds" not in row:
        return unmeasured(name, goal)
    ratio = loop / row["seconds"]
    return Check(name, goal, f"{ratio:,.0f}× ({seconds(loop)}, from a layer of each shape)", ratio >= _OVER_AUTHORS)


def streamed_checks(results: Results) -> list[Check]:
    """Time of the round of 80 GB over what PCIe takes for it, and memory of the device in all rounds streamed."""
    found = data(results, "streamed")
    rounds, why = found.get("rounds", {}), found.get("not_run", {}).get(STREAMED, "not measured")
    name, goal = f"round-7b, {STREAMED}, from host memory: over PCIe", f"≤ {_OVER_PCIE:g}×"
    row = rounds.get(STREAMED, {})
    over = row.get("over_floor")
    if over is None:
        time = unmeasured(name, goal, why)
    else:
        shown = f"{over:.3g}× ({seconds(row['seconds'])}; floor {seconds(row['floor_seconds'])})"
        time = Check(name, goal, shown, over <= _OVER_PCIE)
    memory = [_peak(name, row) for name, row in rounds.items()]
    return [time, _excess(f"round-7b, {STREAMED}, from host memory", row), *memory]


def _peak(round_: str, row: dict[str, Any]) -> Check:
    name, goal = f"round-7b, {round_}, streamed: memory of the device", f"≤ {mebibytes(row['limit'])}"
    if row.get("peak_bytes") is None:
        return unmeasured(name, goal)
    return Check(name, goal, mebibytes(row["peak_bytes"]), row["peak_bytes"] <= row["limit"])


def orthonormal_check(results: Results) -> Check:
    """How far from orthonormal the engine's own method leaves panels of condition 1e6."""
    goal = f"≤ {_SKEW:g}"
    rows = {row["by"]: row for row in data(results, "solvers").get("orthonormal", [])}
    own = next((name for name in _ORTHONORMAL if name in rows), None)
    if own is None:
        return unmeasured("orthonormality at condition 1e6", goal)
    worst = rows[own]["skew"][_CONDITION]
    return Check(f"orthonormality at condition 1e6, {own}", goal, f"{worst:.1e}", worst <= _SKEW)


def op_checks(results: Results) -> list[Check]:
    """``project`` by our kernels on bfloat16 factors, against what bounds it."""
    found = [
        row
        for row in data(results, "roofline").get("rows", [])
        if (row["op"], row["by"], row["factors"]) == ("project", "kernels", "bfloat16")
    ]
    goal = f"≥ {100 * _OF_COPY:.0f} % of copy or {100 * _OF_MATRIX:.0f} % of bf16, whichever bounds"
    if not found:
        return [unmeasured("project", goal)]
    return [_op(row, goal) for row in found]


def _op(row: dict[str, Any], goal: str) -> Check:
    name = f"project, {row['precision']}, {row['width']} columns"
    if row["share"] is None:
        return unmeasured(name, goal, row.get("why", "not measured"))
    least = _OF_COPY if row["bound"] == "copy" else _OF_MATRIX
    return Check(name, goal, f"{100 * row['share']:.0f} % of {row['bound']}", row["share"] >= least)


def checks(results: Results) -> list[Check]:
    """Every target with what was measured."""
    return [*round_checks(results), *streamed_checks(results), orthonormal_check(results), *op_checks(results)]
