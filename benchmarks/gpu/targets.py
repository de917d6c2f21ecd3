"""What was set out to be reached on a GPU, and what a run of the gate measured: from its results, misses included."""

from __future__ import annotations

from typing import Any

from benchmarks.text import Check, seconds

Results = dict[str, Any]

ROUND = "100 x r16"
_LAYERS_SECONDS = 0.040
_EXCESS = 1e-3
_SMALL_SHARE = 0.25
_OVER_AUTHORS = 1000
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
    return [_time(title, row), _excess(title, row), _small(title, row), _same(title, row), _ratio(results, title, row)]


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
    return [*round_checks(results), *op_checks(results)]
