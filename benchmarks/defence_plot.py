"""The picture of ``benchmarks.defences``: error by attack and rule, a panel for each share of hostile clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

# Errors at which colours end: what an honest mean has here, and an update that is nothing but error.
_BEST, _LOST = 0.05, 2.0
_DARK = 0.4  # from here on, letters are white


def plot(found: Mapping[str, Mapping[str, Sequence[float]]], shares: Sequence[float], out: Path) -> None:
    """``found``: by rule and attack the error for each share, NaN where the round stops."""
    hostile = [i for i, share in enumerate(shares) if share > 0]
    attacks = list(next(iter(found.values())))
    figure, axes = plt.subplots(1, len(hostile), figsize=(12, 4.6), sharey=True, layout="constrained")
    for place, i in zip(axes, hostile, strict=True):
        grid = np.array([[row[attack][i] for attack in attacks] for row in found.values()])
        place.set_facecolor("#d0d0d0")
        mesh = place.pcolormesh(grid, cmap="viridis_r", norm=LogNorm(_BEST, _LOST), edgecolors="white", linewidth=0.5)
        for (y, x), value in np.ndenumerate(grid):
            text = "stops" if math.isnan(value) else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            color = "white" if value > _DARK else "black"
            place.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.5, color=color)
        place.set_xticks(np.arange(len(attacks)) + 0.5, attacks, rotation=40, ha="right", fontsize=8)
        place.set_title(f"{100 * shares[i]:.0f} % hostile clients", fontsize=10)
    axes[0].invert_yaxis()  # of all panels
    axes[0].set_yticks(np.arange(len(found)) + 0.5, list(found), fontsize=8)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03, extend="both")
    bar.set_label("‖ΔW − task‖/‖task‖", fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
