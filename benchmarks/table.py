"""The README's benchmark section, generated from the results file: ``python -m benchmarks.table [--print]``.

It replaces what stands between the two markers; nothing else of the README is touched.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import targets, text
from benchmarks.peers import ESTIMATED, OURS, PEERS
from benchmarks.targets import Results, rows
from benchmarks.text import markdown, mebibytes, percent, seconds

RESULTS = Path("benchmarks/results/cpu.json")
README = Path("README.md")
BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks.table) -->", "<!-- benchmarks: end -->"
# Excesses above this are printed beside the time; below it nobody would see a difference.
_VISIBLE = 1e-4


def layer_title(row: dict[str, Any]) -> str:
    shape = row["shape"]
    ranks = (
        "/".join(map(str, shape["ranks"])) if len(shape["ranks"]) <= 3 else f"{shape['ranks'][0]}…{shape['ranks'][-1]}"
    )
    return f"*{row['workload']}*: {shape['m']}×{shape['n']}, {shape['clients']} × r {ranks}, k {shape['k']}"


def cell(row: dict[str, Any], name: str) -> str:
    """A method's time, how many times ours it is, and its excess where it shows."""
    if name not in row["methods"] and name not in row["not_run"]:
        return "–"
    if name in row["not_run"]:
        return f"not run: {row['not_run'][name]}"
    method, own = row["methods"][name], row["methods"][OURS]["seconds"]
    shown = seconds(method["seconds"])
    shown += "" if name == OURS else f" ({method['seconds'] / own:.3g}×)"
    return shown + (f", excess {method['excess']:.0e}" if method["excess"] > _VISIBLE else "")


def layer_table(results: Results) -> str:
    found = rows(results, "layer")
    names = {f"**{OURS}**": OURS} | {name: name for name in (ESTIMATED, *PEERS)}
    body = [[title, *(cell(row, name) for row in found)] for title, name in names.items()]
    return markdown(["", *(layer_title(row) for row in found)], body)


def work_table(results: Results) -> str:
    """Ours in detail: solver, excess, memory, work, and the share of what this machine allows."""
    body = []
    for row in rows(results, "layer"):
        own = row["methods"][OURS]
        work = "–" if own["flops"] is None else f"{own['flops'] / 1e9:,.1f} Gflop, {own['bytes'] / 1e6:,.0f} MB"
        dense = row["methods"].get(targets.DENSE, {}).get("peak_bytes")
        body.append(
            [
                row["workload"],
                own["solver"],
                f"{own['excess']:.0e}",
                mebibytes(own["peak_bytes"]),
                mebibytes(dense),
                work,
                percent(own["share"]),
            ]
        )
    header = ["layer", "solver", "excess", "peak memory", "of a full SVD", "work", "share of the machine's limit"]
    return markdown(header, body)


def round_table(results: Results) -> str:
    body = []
    for row in rows(results, "round"):
        for state, found in row["states"].items():
            body.append(
                [
                    f"*{row['workload']}*: {row['layers']} layers, {row['clients']} clients, "
                    f"{row['bytes'] / 1e9:.2g} GB, {state}",
                    seconds(found["seconds"]),
                    seconds(found["read_floor"]),
                    "–" if (compute := targets.compute_floor(results, found)) is None else seconds(compute),
                    mebibytes(found["peak_bytes"]),
                ]
            )
    return markdown(
        ["round, files on disk", "wall", "reading alone", "computing alone, in bfloat16", "peak resident"], body
    )


def scale_table(results: Results) -> str:
    body = []
    for row in rows(results, "scale"):
        for clients, found in row["points"].items():
            each = found["seconds"] / int(clients)
            last = f"{seconds(found['last_client_seconds'])} ({found['last_client_seconds'] / found['seconds']:.0%})"
            body.append(
                [f"{int(clients):,}", seconds(found["seconds"]), seconds(each), last, mebibytes(found["peak_bytes"])]
            )
    return markdown(["clients", "wall", "a client", "from the last client on", "peak resident"], body)


def target_table(results: Results) -> str:
    return text.target_table(targets.checks(results))


def section(results: Results) -> str:
    """All tables, with where and how they were measured."""
    machine = results["machine_info"]
    rate, copy = machine["limits"]["matrix_float32"] / 1e9, machine["limits"]["copy"] / 1e9
    scale = rows(results, "scale")
    parts = [
        f"Measured at commit {results['commit_info']['id']} on {machine['cpu']} ({machine['isa']}, "
        f"{machine['threads']} threads, torch {machine['packages']['torch']}): {rate:.0f} Gflop/s in float32 products, "
        f"{copy:.0f} GB/s in copies. Medians of runs in alternation; in brackets how many times ours. Excess is over "
        "the best rank-k in float64, printed above 1e-4. Peak memory is what a method needs beyond its inputs; the "
        "limit is the slower of its flops at that rate and its traffic at that bandwidth.",
        layer_table(results),
        work_table(results),
    ]
    if rows(results, "round"):
        parts.append(round_table(results))
    for row in scale:
        shape = row["shape"]
        parts += [
            f"More and more clients (one layer {shape['m']}×{shape['n']}, r {shape['r']}, on disk, "
            f'`memory_limit="{row["memory_limit"]}"`):',
            scale_table(results),
        ]
    return "\n\n".join([*parts, "What was aimed at:", target_table(results)])


def splice(readme: str, section: str) -> str:
    """The README with ``section`` between the markers."""
    return text.splice(readme, section, BEGIN, END)


def is_suite(results: Results) -> bool:
    return "benchmarks" in results and not results["quick"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the section and leave the README alone")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if args.print:
        print(section(results))
        return
    if not is_suite(results):
        sys.exit(f"{args.results} is not of a full run of the suite; `make bench` makes one")
    README.write_text(splice(README.read_text(), section(results)))
    print(target_table(results))


if __name__ == "__main__":
    main()
