"""Images of a round. Figures are built without pyplot: no window, no global state, safe in a server's threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexlora_fast import tables
from flexlora_fast.report import Report, energy_curve, grouped
from flexlora_fast.tables import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = 8  # more lines than this in one axes cannot be told apart
_LABELLED = 40  # more row labels than this are too small to read: groups are labelled instead
_FONT = 9  # points
_LEAST_LOST = 1e-4  # of the energy; where less is lost, a heat map has its last colour
# Okabe and Ito's palette (2008), which colour-blind readers can tell apart, without its yellow (too pale for lines).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")


def save(figure: Figure, path: str | Path) -> Path:
    """Write the image whole or not at all; its kind is the suffix (png, svg, pdf)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def energy(report: Report) -> Figure:
    """Energy kept by rank: a line per layer where there are few, else a heat map of layers (rows) by rank."""
    curves = [energy_curve(report.update[layer]).numpy()[1:] for layer in report.layers]
    widest = max([len(curve) for curve in curves] + report.ranks + [1])
    grid = np.full((len(curves), widest), np.nan)
    for row, (curve, layer) in enumerate(zip(curves, report.layers, strict=True)):
        grid[row, : len(curve)] = curve
        if report.update[layer].complete and len(curve):  # nothing was cut off: more columns add nothing
            grid[row, len(curve) :] = curve[-1]
    return _energy_lines(report, grid) if len(curves) <= _LINES else _energy_map(report, grid)


def spectrum(report: Report) -> Figure:
    """Singular values by index, on a logarithmic axis: a line per layer where there are few, else by module the
    median over its layers in a band from the least to the largest. Experts are joined as √Σ_e σ².
    """
    figure, axes = _figure(8.0, 4.8)
    values: dict[str, np.ndarray] = {}
    for layer in report.layers:
        S = report.update[layer].S
        values[layer] = (S.square().sum(dim=0).sqrt() if S.dim() == 2 else S).double().numpy()
    top = max((float(sigma.max()) for sigma in values.values() if sigma.size), default=0.0)
    if top == 0:
        axes.text(0.5, 0.5, "every update is zero", transform=axes.transAxes, ha="center", va="center")
        axes.set_axis_off()
        return figure
    # What is below float32 rounding of the largest value is noise, and would stretch the axis.
    floor = 1e-8 * top
    if len(values) <= _LINES:
        for i, (layer, sigma) in enumerate(values.items()):
            _spectrum_line(axes, sigma, floor, i, short(layer, 48))
    else:
        _spectrum_bands(axes, report, values, floor)
    axes.set_yscale("log")
    _rank_axis(axes, max(len(sigma) for sigma in values.values()), report.ranks)
    axes.set_ylabel("singular value σ of ΔW")
    axes.set_xlabel("index j of σ_j; dashed: ranks of the clients")
    _put_title(axes, _title(report, "Spectrum of the update"))
    _legend(axes, "upper right")
    return figure


def _energy_lines(report: Report, grid: np.ndarray) -> Figure:
    figure, axes = _figure(8.0, 4.8)
    x = np.arange(1, grid.shape[1] + 1)
    for i, layer in enumerate(report.layers):
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if grid.shape[1] <= 32 else {}
        axes.plot(x, 100 * grid[i], color=COLOURS[i % len(COLOURS)], label=short(layer, 48), lw=1.6, **style)
    _rank_axis(axes, grid.shape[1], report.ranks)
    low = float(np.nanmin(grid)) if np.isfinite(grid).any() else 0.0
    axes.set_ylim(min(0.0, 105 * low), 104)
    axes.set_ylabel("energy kept (% of ‖ΔW‖²)")
    _put_title(axes, _title(report, "Energy kept by layer and rank"))
    if report.layers:
        _legend(axes, "lower right")
    return figure


def _energy_map(report: Report, grid: np.ndarray) -> Figure:
    """Colours by the number of nines: on a linear scale 98% and 99.99% would be one colour."""
    from matplotlib.colors import LogNorm

    groups = grouped(report.rows)
    position = {layer: i for i, layer in enumerate(report.layers)}
    order = [position[row["layer"]] for rows in groups.values() for row in rows]
    count, widest = grid.shape
    figure, axes = _figure(9.0, 1.8 + min(11.0, max(3.0, 0.19 * count)))
    axes.set_facecolor("#d0d0d0")
    axes.grid(False)
    lost = np.clip(1 - grid[order], _LEAST_LOST, 1.0)
    edges = np.arange(widest + 1) + 0.5
    mesh = axes.pcolormesh(
        edges, np.arange(count + 1), lost, cmap="viridis_r", norm=LogNorm(_LEAST_LOST, 1), rasterized=True
    )
    axes.invert_yaxis()
    _rank_axis(axes, widest, report.ranks, edges=True)
    _row_labels(axes, groups, count)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.04)
    bar.set_ticks([1, 0.5, 0.1, 0.01, 0.001, _LEAST_LOST], labels=["0%", "50%", "90%", "99%", "99.9%", "≥99.99%"])
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label("energy kept, of ‖ΔW‖²", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT - 1)
    note = "   (grey: beyond the columns kept)" if np.isnan(grid).any() else ""
    _put_title(axes, _title(report, "Energy kept by layer and rank") + note)
    return figure


def _row_labels(axes: Axes, groups: dict[str, list[dict[str, Any]]], count: int) -> None:
    """Layer names where they fit, else the name of each group at its middle, with lines between groups."""
    if count <= _LABELLED:
        names = [row["layer"] for rows in groups.values() for row in rows]
        prefix = _common_prefix(names)
        axes.set_yticks(np.arange(count) + 0.5, [short(name.removeprefix(prefix), 40) for name in names])
        axes.set_ylabel(f"layer, under {short(prefix.rstrip('.'), 40)}" if prefix else "layer")
        axes.tick_params(axis="y", labelsize=_FONT - 1)
    else:
        prefix = _common_prefix(list(groups))
        sizes = [len(rows) for rows in groups.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        labels = [f"{short(name.removeprefix(prefix), 34)} ({n})" for name, n in zip(groups, sizes, strict=True)]
        middles = [start + size / 2 for start, size in zip(starts, sizes, strict=True)]
        shown = spread(range(len(labels)), _LABELLED)
        axes.set_yticks([middles[i] for i in shown], [labels[i] for i in shown])
        axes.set_ylabel("module (number of layers)" + (f", under {short(prefix.rstrip('.'), 30)}" if prefix else ""))
    last = 0
    for rows in list(groups.values())[:-1]:
        last += len(rows)
        axes.axhline(last, color="white", lw=1.2)


def _spectrum_line(axes: Axes, S: np.ndarray, floor: float, i: int, label: str) -> None:
    x = np.arange(1, len(S) + 1)
    marker = "o" if len(S) <= 32 else None
    y = np.where(floor < S, S, np.nan)
    axes.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, lw=1.6, marker=marker, ms=3)


def _spectrum_bands(axes: Axes, report: Report, values: dict[str, np.ndarray], floor: float) -> None:
    groups = grouped(report.rows)
    prefix = _common_prefix(list(groups)) if len(groups) > 1 else ""
    # The strongest groups have their own colour; the others would not be told apart.
    ranked = sorted(groups, key=lambda name: -max(row["norm"] for row in groups[name]))
    for i, name in enumerate(ranked[:_LINES]):
        longest = max(len(values[row["layer"]]) for row in groups[name])
        block = np.full((len(groups[name]), longest), np.nan)
        for row, facts in zip(block, groups[name], strict=True):
            S = values[facts["layer"]]
            row[: len(S)] = np.where(floor < S, S, np.nan)
        known = np.isfinite(block).any(axis=0)
        x, block = np.arange(1, longest + 1)[known], block[:, known]
        if not x.size:
            continue
        colour = COLOURS[i]
        label = f"{short(name.removeprefix(prefix), 40)} ({len(block)})"
        axes.plot(x, np.nanmedian(block, axis=0), color=colour, lw=1.6, label=label)
        axes.fill_between(x, np.nanmin(block, axis=0), np.nanmax(block, axis=0), color=colour, alpha=0.1, lw=0)
    if len(ranked) > _LINES:
        axes.plot([], [], " ", label=f"… and {len(ranked) - _LINES} weaker modules")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=_FONT)
    axes.grid(True, color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _rank_axis(axes: Axes, widest: int, ranks: Sequence[int], edges: bool = False) -> None:
    """x is the rank, base-2 logarithmic where it goes far; the ranks of interest are dashed and named on top."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    linear = widest <= (40 if edges else 16)
    if linear:
        ticks = list(range(1, widest + 1)) if widest <= 16 else [1, *range(4, widest + 1, 4)]
    else:
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(widest.bit_length())]
    margin = (0.5, widest + 0.5) if edges or linear else (0.9, widest * 1.1)
    axes.set_xlim(*margin)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("rank (columns of the adapter); dashed: ranks of the clients")
    for rank in spread([rank for rank in ranks if rank <= widest], 12):
        axes.axvline(rank, color="#c00000" if edges else "#808080", lw=1, ls=(0, (4, 3)))
        axes.annotate(
            f"r={rank}",
            (rank, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=_FONT - 2,
            color="#404040",
        )


def _legend(axes: Axes, where: str) -> None:
    axes.legend(fontsize=_FONT - 1, frameon=True, framealpha=0.85, edgecolor="none", loc=where)


def _put_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=_FONT + 2, pad=18)  # above the labels of the ranks


def _title(report: Report, what: str) -> str:
    counts = [tables.count(len(report.layers), "layer")]
    if report.clients:  # sums name nobody
        counts.append(tables.count(len(report.clients), "client"))
    return f"{what}: {', '.join(counts)}, {report.update.method}"


def short(name: str, length: int) -> str:
    """A printable label, its middle cut out where it is long; ``$`` would start a formula."""
    name = tables.clean(name)
    if len(name) > length:
        name = f"{name[: length // 3]}…{name[-(length - length // 3 - 1) :]}"
    return name.replace("$", r"\$")


def _common_prefix(names: Sequence[str]) -> str:
    """The leading path parts that all names share."""
    if len(names) < 2:
        return ""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)
