"""The demo's one figure: what the federations reached, and how much of each update a rank can hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # it is only ever saved to a file

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.demo_server import Federation

# Two colours of the Okabe-Ito palette, told apart by colour-blind readers too.
COLOURS = {"flexlora": "#0072B2", "fedit": "#D55E00"}
NAMES = {"flexlora": "FlexLoRA", "fedit": "FedIT"}


def plot(federations: Sequence[Federation], test: int, path: Path) -> Path:
    """Save the figure as PNG; returns its path. ``test`` is the number of test questions."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    accuracy(left, federations, test)
    by_rank(middle, federations, test)
    energy(right, federations)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def label(federation: Federation) -> str:
    low, high = min(federation.ranks), max(federation.ranks)
    return f"{NAMES[federation.name]}, r={low}" if low == high else f"{NAMES[federation.name]}, r={low}…{high}"


def by_arm(federations: Sequence[Federation]) -> list[list[Federation]]:
    names = dict.fromkeys(federation.name for federation in federations)
    return [[f for f in federations if f.name == name] for name in names]


def wilson(accuracy: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a binomial share (Wilson 1927), which stays inside 0…1 unlike ± 2 standard errors."""
    z = 1.96
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def accuracy(axes: Axes, federations: Sequence[Federation], test: int) -> None:
    """Accuracy by round: seeds as thin lines, their mean as a thick one with the test set's binomial band."""
    for arm in by_arm(federations):
        rounds = [result.number for result in arm[0].rounds]
        runs = np.array([[r.scores[max(f.ranks)].accuracy for r in f.rounds] for f in arm])
        mean, colour = runs.mean(0), COLOURS[arm[0].name]
        axes.plot(rounds, mean, "o-", color=colour, label=label(arm[0]), markersize=4)
        axes.fill_between(rounds, *wilson(mean, test), color=colour, alpha=0.15, linewidth=0)
        if len(arm) > 1:
            axes.plot(rounds, runs.T, color=colour, alpha=0.35, linewidth=0.8)
    seeds = len({federation.seed for federation in federations})
    axes.set(xlabel="round", ylabel=f"accuracy on {test} held-out questions")
    axes.set_title(f"Global model ({seeds} seed{'s' * (seeds > 1)}; band: 95 % binomial)", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")


def by_rank(axes: Axes, federations: Sequence[Federation], test: int) -> None:
    """Accuracy of what each client rank is handed after the last round."""
    for arm in by_arm(federations):
        ranks = np.array(sorted(set(arm[0].ranks)))
        runs = np.array([[f.rounds[-1].scores[rank].accuracy for rank in ranks] for f in arm])
        mean, colour = runs.mean(0), COLOURS[arm[0].name]
        low, high = wilson(mean, test)
        axes.errorbar(ranks, mean, (mean - low, high - mean), fmt="o-", color=colour, capsize=3, markersize=4)
    everyone = sorted({rank for federation in federations for rank in federation.ranks})
    axes.set_xscale("log", base=2)
    axes.set_xticks(everyone, [str(rank) for rank in everyone])
    axes.set(xlabel="client rank", ylabel="accuracy")
    axes.set_title("What each rank is handed, last round", fontsize=10)


def energy(axes: Axes, federations: Sequence[Federation]) -> None:
    """The share of ‖ΔW‖² that a rank holds, over all layers, in the first and the last round of FlexLoRA."""
    mixed = next(federation for federation in federations if federation.name == "flexlora")
    clients = np.array(sorted(set(mixed.ranks)))
    for result, style in ((mixed.rounds[0], ":"), (mixed.rounds[-1], "-")):
        ranks = np.arange(1, len(result.energy) + 1)
        axes.plot(ranks, result.energy, style, color=COLOURS["flexlora"], label=f"round {result.number}")
        axes.plot(clients, np.array(result.energy)[clients - 1], "o", color=COLOURS["flexlora"], markersize=4)
    axes.set_xscale("log", base=2)
    ticks = sorted({1, *clients.tolist()})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.set(xlabel="rank (dots: the clients')", ylabel="energy kept")
    axes.set_title(f"Share of the global update a rank holds (seed {mixed.seed})", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
