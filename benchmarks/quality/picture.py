"""The pictures of a grid: final scores with their differences to the reference, and scores by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexlora_fast.plots import short
from flexlora_fast.simulate import charts, svg
from flexlora_fast.simulate.comparison import Arm, Part, Row
from flexlora_fast.simulate.statistics import Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICTS = {"better": "#009E73", "worse": "#D55E00", "undecided": "#7F7F7F", "reference": "#0072B2"}


def finals(settings: Sequence[tuple[str, Sequence[Row]]], reference: str, part: Part) -> Figure:
    """A row of two panels a setting: the score of each arm on ``part``, mean and 95 % interval with the seeds as dots;
    and its difference to the reference, coloured where the corrected t-test finds one.
    """
    longest = max(len(rows) for _, rows in settings)
    made, every = svg.figure(10.5, len(settings) * (1.0 + 0.22 * longest), svg.PRINT, 2 * len(settings), 2)
    made.patch.set_alpha(1)
    for (name, rows), left, right in zip(settings, every[::2], every[1::2], strict=True):
        _scores(left, name, rows, part)
        _differences(right, rows, reference)
    return made


def rounds(arms: Sequence[Arm], part: Part) -> Figure:
    """The score by round of each arm beside the first."""
    made = charts.score(arms, svg.PRINT, part)
    made.patch.set_alpha(1)
    return made


def _scores(axes: Axes, name: str, rows: Sequence[Row], part: Part) -> None:
    for y, row in enumerate(rows):
        values = 100 * np.array([test.value for test in row.arm.tests(part)])
        axes.plot(values, np.full(len(values), y), "o", color=VERDICTS[row.verdict], ms=3, alpha=0.45, mec="none")
        axes.errorbar(100 * row.final.mean, y, xerr=_half(row.final), **_mark(row))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -1), min(high, 101))  # two seeds' intervals are wider than what a score can be
    metric = next(test.metric for row in rows for test in row.arm.tests(part))
    _arms_axis(axes, rows, f"{metric}, %")
    axes.set_title(name, loc="left", fontsize=10)


def _differences(axes: Axes, rows: Sequence[Row], reference: str) -> None:
    axes.axvline(0, color=VERDICTS["reference"], lw=1)
    for y, row in enumerate(rows):
        if row.difference is not None:
            axes.errorbar(100 * row.difference.mean, y, xerr=_half(row.difference), **_mark(row))
    _arms_axis(axes, rows, f"points − {reference}, paired, 95 % interval")
    axes.tick_params(labelleft=False)


def _half(found: Mean) -> Any:
    return 100 * (found.high - found.mean) if found.n > 1 else None


def _mark(row: Row) -> dict[str, Any]:
    return {"fmt": "D", "ms": 4.5, "capsize": 2.5, "lw": 1.2, "color": VERDICTS[row.verdict]}


def _arms_axis(axes: Axes, rows: Sequence[Row], name: str) -> None:
    axes.set_yticks(range(len(rows)), [short(row.arm.label, 40) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(name)
