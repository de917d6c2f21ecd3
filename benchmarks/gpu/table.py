"""The gate's tables, from its results file: ``python -m benchmarks.gpu.table [--print] [RESULTS]``.

Without ``--print`` it replaces what stands between the two markers in the README with what the committed results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import text
from benchmarks.gpu import targets
from benchmarks.gpu.targets import Results, data
from benchmarks.text import markdown, percent, seconds

FOLDER, NAME = Path("benchmarks/results"), "gate.json"
RESULTS = FOLDER / "h200" / NAME
# What the streamed stage draws, beside the results.
PICTURE = "timeline.png"
README = Path("README.md")
BEGIN, END = "<!-- gpu: begin (python -m benchmarks.gpu.table) -->", "<!-- gpu: end -->"
OURS = "flexlora_fast"
_VISIBLE = 1e-4
# Eigenpairs further off than this are no answer in float64.
_WRONG = 1e-9


def folder_of(results: Results) -> Path | None:
    """Where results of this GPU are kept: "NVIDIA H200" -> benchmarks/results/h200. None where none was seen."""
    name = data(results, "ceilings").get("machine", {}).get("device", "")
    words = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    return FOLDER / words if words else None


def rate(value: Any, unit: str) -> str:
    """Tera-units per second, or why there is none."""
    return f"{value / 1e12:.3g} T{unit}/s" if isinstance(value, float) else "–"


def ceilings_line(results: Results) -> str:
    """Where, and what it can do."""
    found = data(results, "ceilings")
    machine, pcie = found.get("machine", {}), found.get("pcie")
    over = "–" if not isinstance(pcie, dict) else f"{pcie['to_device'] / 1e9:.3g} / {pcie['to_host'] / 1e9:.3g} GB/s"
    return (
        f"{machine.get('device', 'device unknown')} (torch {machine.get('torch', '?')}): copies "
        f"{rate(found.get('copy'), 'B')}, products {rate(found.get('bf16'), 'flop')} in bf16, "
        f"{rate(found.get('tf32'), 'flop')} in TF32, {rate(found.get('float32'), 'flop')} in float32, "
        f"{rate(found.get('float64'), 'flop')} in float64; PCIe to and from the device {over}"
    )


def stage_table(results: Results) -> str:
    """Every stage's outcome."""
    body = []
    for name, record in results["stages"].items():
        counts = record.get("data", {}).get("counts")
        said = ", ".join(f"{number} {word}" for word, number in counts.items()) if counts else ""
        note = "; ".join(part for part in (said, record["reason"]) if part)
        body.append([name, record["outcome"], f"{record['seconds']:.0f} s", note[:160].replace("|", "/")])
    return markdown(["stage", "outcome", "time", ""], body)


def round_table(results: Results) -> str:
    """round-7b at either rank."""
    body = []
    for name, row in data(results, "round").items():
        if "seconds" not in row:  # errors, or a round that did not come to its end
            continue
        small, floor, peak = row.get("small", {}).get("share"), row.get("floor_seconds"), row.get("peak_bytes")
        loop = data(results, "loop").get(name, {}).get("total_seconds")
        body.append(
            [
                f"{row['layers']} layers, {name}, k {row['k']}, {row['bytes'] / 1e9:.2g} GB",
                seconds(row["seconds"]),
                "–" if row.get("device_seconds") is None else seconds(row["device_seconds"]),
                "–" if floor is None else seconds(floor),
                f"{max(row['excess'].values()):.0e}" if row.get("excess") else "–",
                percent(small),
                text.mebibytes(peak),
                "–" if loop is None else f"{seconds(loop)} ({loop / row['seconds']:,.0f}×)",
            ]
        )
    header = [
        "*round-7b*, resident",
        "all layers",
        "on the device",
        "floor",
        "excess",
        "small problems",
        "memory",
        "authors' loop",
    ]
    return markdown(header, body) if body else ""


def streamed_table(results: Results) -> str:
    """round-7b with its factors elsewhere, and what a part of it did when."""
    body = []
    for name, row in data(results, "streamed").get("rounds", {}).items():
        if "seconds" not in row:
            continue
        floor, over = row.get("floor_seconds"), row.get("over_floor")
        body.append(
            [
                f"{row['layers']} layers, {name}, k {row['k']}, {row['bytes'] / 1e9:.2g} GB, from {row['from']}",
                seconds(row["seconds"]),
                "–" if floor is None else f"{seconds(floor)} ({over:.3g}×)",
                seconds(row["take_in_seconds"]),
                f"{max(row['excess'].values()):.0e}" if row.get("excess") else "–",
                text.mebibytes(row["peak_bytes"]),
                text.mebibytes(row["reserved_bytes"]),
                text.mebibytes(row["limit"]),
                ", ".join(f"{solver} {count}" for solver, count in row["solvers"].items()),
            ]
        )
    header = [
        "*round-7b*, streamed",
        "all layers",
        "PCIe",
        "taken in",
        "excess",
        "memory",
        "reserved",
        "limit",
        "solvers",
    ]
    parts = [markdown(header, body) if body else "", timeline_line(results)]
    parts += [f"Not run: {what}: {why}." for what, why in data(results, "streamed").get("not_run", {}).items()]
    return "\n\n".join(part for part in parts if part)


def timeline_line(results: Results) -> str:
    """How much of the copies and of the kernels went on at the same time."""
    found = data(results, "streamed").get("timeline", {})
    if found.get("copies_overlapped") is None:
        return ""
    copies, kernels = seconds(found["copy_seconds"]), seconds(found["kernel_seconds"])
    under_kernels, under_copies = percent(found["copies_overlapped"]), percent(found["kernels_overlapped"])
    return (
        f"Of {found['layers']} layers of {found['clients']:,} clients ({found['bytes'] / 1e9:.2g} GB, "
        f"{seconds(found['seconds'])}): copies to the device for {copies}, {under_kernels} of that under kernels; "
        f"kernels for {kernels}, {under_copies} of that under copies; neither for {percent(found['idle'])} of the time."
    )


def picture(results: Results) -> str:
    """The timeline's image, where one was drawn."""
    drawn = data(results, "streamed").get("timeline", {}).get("picture")
    return f"![What the device did when]({RESULTS.with_name(drawn)})" if drawn else ""


def solver_table(results: Results) -> str:
    """Small dense problems: eigensolvers by columns, and what makes panels orthonormal by condition."""
    found = data(results, "solvers")
    rows = found.get("eigen", [])
    names = list(dict.fromkeys(name for row in rows for name in (*row["by"], *row["not_run"])))

    def shown(row: dict[str, Any], name: str) -> str:
        if name not in row["by"]:
            return row["not_run"].get(name, "–")
        one = row["by"][name]
        wrong = f", off by {one['error']:.0e}" if one["error"] > _WRONG else ""
        return seconds(one["seconds"]) + ("*" if one["scaled"] else "") + wrong

    header = [f"{found.get('matrices')} eigenproblems, float64", *(f"{row['columns']} columns" for row in rows)]
    tables = [markdown(header, [[name, *(shown(row, name) for row in rows)] for name in names]) if names else ""]
    if any(one["scaled"] for row in rows for one in row["by"].values()):
        tables.append("\\* of 8 matrices, times the rest: it takes one after the other.")
    panels = found.get("orthonormal", [])
    if panels:
        size = "{count} panels of {rows}×{columns}".format(**found["panels"])
        header = [f"{size}, float32", "time", *(f"off by, condition {condition}" for condition in panels[0]["skew"])]
        body = [[row["by"], seconds(row["seconds"]), *(f"{x:.0e}" for x in row["skew"].values())] for row in panels]
        tables.append(markdown(header, body))
    tables += [f"Not run: {name}: {why}." for name, why in found.get("not_run", {}).items()]
    return "\n\n".join(part for part in tables if part)


def cell(row: dict[str, Any], name: str) -> str:
    """A method's time, how many times ours it is, and its excess where it shows."""
    if name not in row["methods"]:
        return f"not run: {row['not_run'][name]}" if name in row["not_run"] else "–"
    method, own = row["methods"][name], row["methods"].get(OURS)
    shown = seconds(method["seconds"])
    shown += f" ({method['seconds'] / own['seconds']:.3g}×)" if own and name != OURS else ""
    return shown + (f", excess {method['excess']:.0e}" if method["excess"] > _VISIBLE else "")


def layer_table(results: Results) -> str:
    """Single layers: a row a method, a column a workload."""
    rows = data(results, "layers").get("layers", [])
    names = list(dict.fromkeys(name for row in rows for name in (*row["methods"], *row["not_run"])))
    body = [[f"**{name}**" if name == OURS else name, *(cell(row, name) for row in rows)] for name in names]
    header = [
        "",
        *(f"*{row['workload']}*: {row['shape']['m']}×{row['shape']['n']}, R {row['shape']['R']}" for row in rows),
    ]
    return markdown(header, body) if body else ""


def op_table(results: Results) -> str:
    """Each op: what it reaches of what bounds it."""
    rows = data(results, "roofline").get("rows", [])
    widths = sorted({row["width"] for row in rows})
    groups: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key = (row["op"], row["factors"], row["by"], row["precision"])
        share = "" if row["share"] is None else f", {100 * row['share']:.0f} % of {row['bound']}"
        groups.setdefault(key, {})[row["width"]] = seconds(row["seconds"]) + share
    body = [[*key, *(cells.get(width, "–") for width in widths)] for key, cells in groups.items()]
    header = ["op", "factors", "by", "precision", *(f"{width} columns" for width in widths)]
    return markdown(header, body) if body else ""


def counter_table(results: Results) -> str:
    """ncu's figures."""
    body = [
        [
            launch["kernel"],
            seconds(launch["seconds"]) if "seconds" in launch else "–",
            *(percent(launch.get(key)) for key in ("dram_share", "l2_share", "compute_share", "occupancy")),
        ]
        for launch in data(results, "ncu").get("launches", [])
    ]
    header = ["kernel", "time", "DRAM", "L2", "compute", "occupancy"]
    return markdown(header, body) if body else ""


def commit_line(results: Results) -> str:
    known = results["commit_info"]
    unknown = f" ({known['source']})" if known["id"] == "unknown" else ""
    return f"commit {known['id']}{unknown}"


def summary(results: Results) -> str:
    """What the gate prints last: stages, round, targets."""
    head = f"{commit_line(results)}\n{ceilings_line(results)}"
    trial = "A trial at small sizes: its times say nothing." if results["quick"] else ""
    tables = [stage_table(results), round_table(results), streamed_table(results), solver_table(results)]
    parts = [head, trial, *tables, text.target_table(targets.checks(results))]
    return "\n\n".join(part for part in parts if part)


def section(results: Results) -> str:
    """The README's section: everything that was measured, with where and how."""
    parts = [
        f"Measured by `make gpu` at {commit_line(results)} on {ceilings_line(results)}. Methods of milliseconds run in "
        "alternation (medians), those with a full SVD once; in brackets how many times ours. Excess is over the best "
        "rank-k in float64, printed above 1e-4. The floor of a round is six passes over its factors, each the slower "
        "of reading them and of three bf16 products with k + 10 columns.",
        round_table(results),
        streamed_table(results),
        picture(results),
        solver_table(results),
        layer_table(results),
        op_table(results),
        counter_table(results),
        "What was aimed at:",
        text.target_table(targets.checks(results)),
    ]
    return "\n\n".join(part for part in parts if part)


def is_full(results: Results) -> bool:
    """Whether these are results that the README may show."""
    return results.get("kind") == "gpu" and not results["quick"] and results["commit_info"]["id"] != "unknown"


def splice(readme: str, section: str) -> str:
    """The README with ``section`` between the markers."""
    return text.splice(readme, section, BEGIN, END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print section and summary, leave the README alone")
    given = parser.parse_args()
    if not given.results.is_file():
        sys.exit(f"{given.results} is not there; `make gpu` on a machine with a GPU writes it")
    results = json.loads(given.results.read_text())
    if given.print:
        print(f"{section(results)}\n\n{summary(results)}")
        return
    if not is_full(results):
        sys.exit(f"{given.results} is no full run of a known commit; `make gpu` on a machine with a GPU makes one")
    README.write_text(splice(README.read_text(), section(results)))
    print(text.target_table(targets.checks(results)))


if __name__ == "__main__":
    main()
