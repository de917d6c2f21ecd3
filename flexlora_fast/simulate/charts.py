"""The figures of a simulation's report: how the score, the loss, the update and the times went by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexlora_fast.plots import short
from flexlora_fast.simulate import statistics, svg
from flexlora_fast.simulate.comparison import Arm, Part, loss_of, value_of
from flexlora_fast.simulate.results import Round, Run
from flexlora_fast.simulate.svg import SERIES, Palette
from flexlora_fast.tables import natural, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With more arms than this in one panel bands hide the lines: each arm then has a panel of its own.
TOGETHER = 5
_COLUMNS = 4
_NARROW, _WIDE = 5.6, 10.8  # inches: half and all of a page's width, at 9-point text
_BELOW = 1e-4  # of the largest singular value: what is less is not drawn
PARTS = ("train", "aggregate", "evaluate")
Get = Callable[[Round], float | None]


def score(arms: Sequence[Arm], palette: Palette, part: Part = "test") -> Figure:
    """The metric by round: the mean over seeds in Student's 95 % interval, or for one seed in that of the test's rows;
    with many arms a panel each, with the first beside it.
    """
    name = next((run.metric for arm in arms for run in arm.runs if run.last(part)), "metric")
    return _by_round(arms, palette, lambda line: value_of(line, part), name, part)


def loss(arms: Sequence[Arm], palette: Palette, part: Part = "test") -> Figure:
    """The mean loss on the test by round, and for a single arm that of training beside it."""
    if len(arms) > 1:
        return _by_round(arms, palette, lambda line: loss_of(line, part), "loss (nats)", None)
    made, axes = _panel(arms, palette)
    _line(axes, arms[0], lambda line: loss_of(line, part), 0, palette, part, None)
    _line(axes, arms[0], _train_loss, 1, palette, "training", None)
    _rounds_axis(axes, "loss (nats)")
    _legend(axes, palette)
    return made


def energy(arms: Sequence[Arm], palette: Palette) -> Figure | None:
    """Share of ‖ΔW‖² that a rank holds, by round: a line a rank, or with several arms a line each at the smallest rank.

    None where no round says.
    """
    known = {rank for arm in arms for run in arm.runs for _, up in run.updates() for rank in up.energy_kept}
    ranks = sorted(known, key=natural)
    if not ranks:
        return None
    made, axes = _panel(arms, palette)
    if len(arms) == 1:
        for i, place in enumerate(spread(range(len(ranks)), SERIES)):
            _line(axes, arms[0], energy_at(ranks[place]), i, palette, f"rank {ranks[place]}", None)
    else:
        _lines(axes, arms, energy_at(ranks[0]), palette)
    _rounds_axis(axes, "energy kept" if len(arms) == 1 else f"energy kept at rank {ranks[0]}")
    _fit(axes)
    axes.set_ylim(top=1.02)
    _legend(axes, palette)
    return made


def effective_rank(arms: Sequence[Arm], palette: Palette) -> Figure | None:
    """exp of the entropy of σ/Σσ of the update by round: where it falls, ranks collapse. None where no round says."""
    if not any(up.effective_rank for arm in arms for run in arm.runs for _, up in run.updates()):
        return None
    made, axes = _panel(arms, palette)
    _lines(axes, arms, _effective, palette)
    _rounds_axis(axes, "effective rank")
    _fit(axes)
    axes.set_ylim(bottom=0)
    if len(arms) > 1:
        _legend(axes, palette)
    return made


def spectrum(arms: Sequence[Arm], palette: Palette) -> Figure | None:
    """σ_j/σ_1 of the largest layer by j: of some rounds of the first seed, or with several arms of the last round of
    each. None where no round says.
    """
    lines: list[tuple[str, list[float]]] = []
    if len(arms) == 1:
        updates = [(number, up.spectrum) for number, up in arms[0].runs[0].updates() if up.spectrum]
        lines = [(f"round {updates[i][0]}", updates[i][1]) for i in spread(range(len(updates)), 5)]
    else:
        for arm in arms:
            updates = [(number, up.spectrum) for number, up in arm.runs[0].updates() if up.spectrum]
            lines += [(arm.label, updates[-1][1])] if updates else []
    lines = [(label, sigma) for label, sigma in lines if max(sigma) > 0]
    if not lines:
        return None
    made, axes = _panel(arms, palette)
    for i, (label, sigma) in enumerate(lines):
        share = np.array(sigma) / max(sigma)
        share = np.where(share >= _BELOW, share, np.nan)
        axes.plot(np.arange(1, len(share) + 1), share, label=short(label, 40), **_style(i, palette, marker=False))
    axes.set_yscale("log")
    axes.set_xlabel("index j")
    axes.set_ylabel("σ_j / σ_1")
    _legend(axes, palette)
    return made


def by_rank(arms: Sequence[Arm], palette: Palette, part: Part = "test") -> Figure | None:
    """The metric of what clients of each rank are handed after the last round, mean over seeds in its 95 % interval;
    arms a little apart. None where no arm has more than one rank.
    """
    ranks = sorted({rank for arm in arms for test in arm.tests(part) for rank in test.by_rank}, key=natural)
    if len(ranks) < 2:
        return None
    name = next((run.metric for arm in arms for run in arm.runs), "metric")

    def draw(axes: Axes, arm: Arm, i: int, shift: float, label: str) -> None:
        tests = arm.tests(part)
        own = [rank for rank in ranks if tests and all(rank in test.by_rank for test in tests)]
        if not own:
            return
        means = [statistics.mean([test.by_rank[rank].value for test in tests]) for rank in own]
        x = np.array([ranks.index(rank) for rank in own]) + shift
        half = np.array([mean.high - mean.mean for mean in means]) if means[0].n > 1 else None
        style = _style(i, palette)
        axes.errorbar(x, [mean.mean for mean in means], half, label=label, capsize=2, elinewidth=0.8, **style)

    def finish(axes: Axes, left: bool, bottom: bool) -> None:
        axes.set_xticks(range(len(ranks)), ranks)
        axes.set_xlabel("rank of the client" if bottom else "")
        axes.set_ylabel(name if left else "")

    if len(arms) > TOGETHER:
        return _panels(arms, palette, lambda axes, arm, i: draw(axes, arm, i, 0.0, arm.label), finish)
    made, axes = _panel(arms, palette)
    for i, arm in enumerate(arms):
        draw(axes, arm, i, 0.4 * ((i + 0.5) / len(arms) - 0.5), short(arm.label, 40))
    finish(axes, True, True)
    if len(arms) > 1:
        _legend(axes, palette)
    return made


def seconds(arms: Sequence[Arm], palette: Palette) -> Figure | None:
    """Mean seconds a round by part: a bar a round, or with several arms a bar each. None where no line says."""
    if not any(line.seconds for arm in arms for run in arm.runs for line in run.rounds):
        return None
    labels: list[str]
    if len(arms) == 1:
        lines = [line for line in arms[0].runs[0].rounds if line.seconds]
        labels = [str(line.round) for line in lines]
        values = {part: [line.seconds.get(part, 0.0) for line in lines] for part in PARTS}
        made, (axes,) = svg.figure(_NARROW, 2.6, palette)
        left = np.zeros(len(labels))
        for i, (part, one) in enumerate(values.items()):
            axes.bar(range(len(labels)), one, 0.7, left, label=part, color=palette.series[i])
            left += np.array(one)
        shown = spread(range(len(labels)), 20)
        axes.set_xticks(shown, [labels[i] for i in shown])
        axes.set_xlabel("round")
        axes.set_ylabel("seconds")
    else:
        labels = [short(arm.label, 40) for arm in arms]
        made, (axes,) = svg.figure(_width(arms), 1.0 + 0.24 * len(arms), palette)
        left = np.zeros(len(arms))
        for i, part in enumerate(PARTS):
            one = [float(np.mean([run.seconds(part) or 0.0 for run in arm.runs])) for arm in arms]
            axes.barh(range(len(arms)), one, 0.7, left, label=part, color=palette.series[i])
            left += np.array(one)
        axes.set_yticks(range(len(arms)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("seconds a round")
    _legend(axes, palette)
    return made


# -- pieces ---


def _by_round(arms: Sequence[Arm], palette: Palette, get: Get, name: str, band: Part | None) -> Figure:
    if len(arms) > TOGETHER:
        return _panels(
            arms,
            palette,
            lambda axes, arm, i: _line(axes, arm, get, i, palette, arm.label, band, marker=False),
            lambda axes, left, bottom: _rounds_axis(axes, name if left else "", bottom),
        )
    made, axes = _panel(arms, palette)
    for i, arm in enumerate(arms):
        _line(axes, arm, get, i, palette, arm.label, band)
    _rounds_axis(axes, name)
    _fit(axes)
    if len(arms) > 1:
        _legend(axes, palette)
    return made


def _lines(axes: Axes, arms: Sequence[Arm], get: Get, palette: Palette) -> None:
    """Every arm in one panel; without intervals where they would hide the lines."""
    for i, arm in enumerate(arms):
        if len(arms) <= TOGETHER:
            _line(axes, arm, get, i, palette, arm.label, None)
            continue
        rounds, values = arm.by_round(get)
        axes.plot(rounds, values.mean(0), label=short(arm.label, 40), **_style(i, palette))


def _panel(arms: Sequence[Arm], palette: Palette) -> tuple[Figure, Axes]:
    """One panel, as high as its legend needs."""
    made, (axes,) = svg.figure(_width(arms), max(3.0, 0.7 + 0.19 * len(arms)), palette)
    return made, axes


def _width(arms: Sequence[Arm]) -> float:
    return _NARROW if len(arms) <= TOGETHER else _WIDE


def _panels(
    arms: Sequence[Arm],
    palette: Palette,
    draw: Callable[[Axes, Arm, int], None],
    finish: Callable[[Axes, bool, bool], None],
) -> Figure:
    """A panel for each arm but the first, which is in all of them. ``finish`` gets whether a panel is at the left and
    at the bottom; the axes are the same in all.
    """
    others = arms[1:]
    rows = -(-len(others) // _COLUMNS)
    made, every = svg.figure(_WIDE, 0.5 + 1.6 * rows, palette, len(others), _COLUMNS)
    for i, (axes, arm) in enumerate(zip(every, others, strict=True)):
        if i:
            axes.sharex(every[0])
            axes.sharey(every[0])
        draw(axes, arms[0], 0)
        draw(axes, arm, 1)
        axes.set_title(short(arm.label, 36), fontsize=9, loc="left", pad=3)
        finish(axes, i % _COLUMNS == 0, i + _COLUMNS >= len(others))
        axes.tick_params(labelsize=8, labelleft=i % _COLUMNS == 0, labelbottom=i + _COLUMNS >= len(others))
    lows, highs = zip(*(_limits(axes) for axes in every), strict=True)
    every[0].set_ylim(min(lows), max(highs))  # of all panels
    lines = [next(iter(axis.lines)) for axis in every[:1] if axis.lines]
    labels = [f"{short(arms[0].label, 40)}, in every panel"]
    where = {"loc": "outside upper left", "fontsize": 9, "frameon": False, "labelcolor": palette.ink}
    made.legend(lines, labels[: len(lines)], **where)
    return made


def _line(
    axes: Axes,
    arm: Arm,
    get: Get,
    i: int,
    palette: Palette,
    label: str,
    band: Part | None,
    marker: bool = True,
) -> None:
    """Mean over the seeds by round, in its interval; ``band``: of which part's rows it is where there is one seed."""
    rounds, values = arm.by_round(get)
    if not len(rounds):
        return
    style = _style(i, palette, marker and len(rounds) <= 40)
    axes.plot(rounds, values.mean(0), label=short(label, 40), **style)
    low, high = _interval(arm.runs[0], rounds, values, band)
    if low is not None:
        axes.fill_between(rounds, low, high, color=style["color"], alpha=0.18, lw=0)


def _interval(run: Run, rounds: np.ndarray, values: np.ndarray, band: Part | None) -> tuple[Any, Any]:
    """Of figures that are never below 0, nor above 1 where they are a part's score; None where nothing says."""
    if len(values) > 1:
        means = [statistics.mean(values[:, j]) for j in range(len(rounds))]
        low, high = np.array([m.low for m in means]), np.array([m.high for m in means])
    elif band is not None:
        tests = dict(run.tests(band))
        half = 1.96 * np.array([tests[int(number)].stderr or 0.0 for number in rounds])
        low, high = values[0] - half, values[0] + half
    else:
        return None, None
    return low.clip(0), high if band is None else high.clip(None, 1)


def _fit(axes: Axes) -> None:
    axes.set_ylim(*_limits(axes))


def _limits(axes: Axes) -> tuple[float, float]:
    """Limits by the lines: two seeds' intervals are so wide that they would press them flat."""
    if not axes.lines:
        return axes.get_ylim()
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    room = 0.5 * max(np.nanmax(values) - np.nanmin(values), 1e-3)
    bottom, top = axes.get_ylim()
    return max(bottom, np.nanmin(values) - room), min(top, np.nanmax(values) + room)


def _style(i: int, palette: Palette, marker: bool = True) -> dict[str, Any]:
    """Of the i-th line: eight colours, then the same dashed; markers tell them apart without colour."""
    style: dict[str, Any] = {"color": palette.series[i % SERIES], "lw": 1.7, "ls": "-" if i < SERIES else "--"}
    return style | ({"marker": "osD^vP*X"[i % SERIES], "markersize": 3.5} if marker else {})


def _rounds_axis(axes: Axes, name: str, named: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("round" if named else "")
    axes.set_ylabel(name)


def _legend(axes: Axes, palette: Palette) -> None:
    """Beside the panel: wherever in it, it would lie on some line."""
    axes.legend(fontsize=8, frameon=False, labelcolor=palette.ink, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _train_loss(line: Round) -> float | None:
    return None if line.train is None else line.train.loss


def _effective(line: Round) -> float | None:
    return None if line.update is None else line.update.effective_rank


def energy_at(rank: str) -> Get:
    """Of a round, the energy kept at that rank."""
    return lambda line: None if line.update is None else line.update.energy_kept.get(rank)
