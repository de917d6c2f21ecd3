"""The plots, from the results file: ``python -m benchmarks.plots`` writes docs/benchmarks.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.peers import OURS
from benchmarks.table import RESULTS
from benchmarks.targets import Results, rows

PLOT = Path("docs/benchmarks.png")
_AXES = {"clients": "clients (r 8)", "rank": "rank of every client (30 clients)", "width": "layer width (30 × r 16)"}
# No excess is drawn below this: float32 does not resolve it.
_LEAST = 1e-9


def style(name: str) -> dict[str, Any]:
    return {"linewidth": 2.5, "color": "black", "zorder": 3} if name == OURS else {"linewidth": 1.2}


def colour(i: int) -> str:
    """Of the i-th method: ours, the first, is black; grey would be taken for it."""
    return ("black", "C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")[i]


def sweep_plot(axes: Any, row: dict[str, Any]) -> None:
    """Seconds along one axis, a line a method."""
    for name, points in row["seconds"].items():
        if points:
            x, y = [int(point) for point in points], list(points.values())
            axes.loglog(x, y, marker="o", markersize=3, label=name, **style(name))
    axes.set_xlabel(_AXES[row["axis"]])
    axes.set_ylabel("seconds")


def excess_plot(axes: Any, results: Results) -> None:
    """Each method on each workload: how long, and how far from the best."""
    markers = "osD^vP*X"
    names = list(dict.fromkeys(name for row in rows(results, "layer") for name in row["methods"]))
    for i, row in enumerate(rows(results, "layer")):
        for j, name in enumerate(names):
            if name in row["methods"]:
                method = row["methods"][name]
                color = colour(j)
                axes.loglog(
                    method["seconds"],
                    max(method["excess"], _LEAST),
                    markers[i % len(markers)],
                    color=color,
                    markersize=5,
                )
    for j, name in enumerate(names):
        axes.plot([], [], "o", color=colour(j), label=name)
    for i, row in enumerate(rows(results, "layer")):
        axes.plot([], [], markers[i % len(markers)], color="black", markerfacecolor="none", label=row["workload"])
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"excess (≤ {_LEAST:.0e} drawn there)")
    axes.legend(fontsize=5.5, ncols=2)


def plot(results: Results, out: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    sweeps = {row["axis"]: row for row in rows(results, "sweep")}
    for place, axis in zip(axes.flat, _AXES, strict=False):
        if axis in sweeps:
            sweep_plot(place, sweeps[axis])
    handles = [handle for place in axes.flat[:3] for handle in place.get_legend_handles_labels()[0]]
    axes[0, 0].legend(handles=list({handle.get_label(): handle for handle in handles}.values()), fontsize=6)
    excess_plot(axes[1, 1], results)
    for place in axes.flat:
        place.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PLOT)
    args = parser.parse_args()
    plot(json.loads(args.results.read_text()), args.out)


if __name__ == "__main__":
    main()
