"""What a comparison of runs shows, and what it cannot, in words; and how its figures are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexlora_fast.simulate import statistics
from flexlora_fast.simulate.comparison import Arm, Part, Row
from flexlora_fast.simulate.statistics import Difference, Mean
from flexlora_fast.tables import count


def share(value: float | None) -> str:
    """A score in [0, 1] in per cent.

    >>> share(0.6123), share(None)
    ('61.2', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def spread_of(found: Mean | None) -> str:
    """Mean ± standard deviation of a score, in per cent.

    >>> spread_of(statistics.mean([0.5, 0.6])), spread_of(statistics.mean([0.5]))
    ('55.0 ± 7.1', '50.0')
    """
    if found is None:
        return "–"
    return share(found.mean) if math.isnan(found.sd) else f"{share(found.mean)} ± {share(found.sd)}"


def plain(found: Mean | None) -> str:
    """Mean ± standard deviation of what is no score.

    >>> plain(statistics.mean([1.0, 1.5]))
    '1.250 ± 0.354'
    """
    if found is None:
        return "–"
    return f"{found.mean:.3f}" if math.isnan(found.sd) else f"{found.mean:.3f} ± {found.sd:.3f}"


def points(value: float) -> str:
    """A difference of scores, in points of per cent.

    >>> points(0.0123), points(-0.0123), points(-0.00001)
    ('+1.2', '−1.2', '0.0')
    """
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def gap(found: Difference | None) -> str:
    """A difference with its 95 % interval, in points."""
    if found is None:
        return "–"
    return points(found.mean) if math.isnan(found.low) else f"{points(found.mean)} [{interval(found)}]"


def interval(found: Mean) -> str:
    """The 95 % interval of a difference, in points."""
    return f"{points(found.low)}, {points(found.high)}"


def p_value(p: float) -> str:
    """Three decimals, never 0.

    >>> p_value(0.0312), p_value(0.00001), p_value(float("nan"))
    ('0.031', '<0.001', '–')
    """
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str:
    """A time as people say it.

    >>> duration(0.0123), duration(3.21), duration(75), duration(7320), duration(None)
    ('12 ms', '3.2 s', '1 min 15 s', '2 h 2 min', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def findings(rows: Sequence[Row]) -> list[str]:
    """Who is better and worse than the reference, and who cannot be told from it, a sentence each."""
    against = next((row for row in rows if row.difference is None), None)
    others = [row for row in rows if row.difference is not None]
    if against is None or not others:
        return []
    if any(row.over == "rows" for row in others):
        return [
            f"{row.arm.label} − {against.arm.label}: {gap(row.difference)} points (95 % interval over "
            f"{count(row.difference.n, 'row')} of the test, paired)."
            for row in others
            if row.difference is not None and row.over == "rows"
        ]
    found = []
    groups = (
        ("worse", f"Worse than {against.arm.label}"),
        ("better", f"Better than {against.arm.label}"),
        ("undecided", f"Not told from {against.arm.label} by these runs"),
    )
    for verdict, start in groups:
        chosen = sorted((row for row in others if row.verdict == verdict), key=_size)
        if chosen:
            found.append(f"{start}: {', '.join(map(_named, chosen))}.")
    best = max(rows, key=lambda row: row.final.mean)
    found.append(
        f"The highest mean is that of {best.arm.label}, {spread_of(best.final)}; being the highest of {len(rows)}, "
        "it is likely to be flattered."
    )
    return found


def _size(row: Row) -> float:
    return -abs(row.difference.mean) if row.difference else 0.0


def _named(row: Row) -> str:
    assert row.difference is not None
    return f"{row.arm.label} ({gap(row.difference)}, p {p_value(row.t_holm)})"


def caveat(arms: Sequence[Arm], rows: Sequence[Row], part: Part = "test") -> str:
    """What these runs can show: how many seeds there are, what was tested, and what the tests assume."""
    least_seeds, seeds = (of(len(arm.runs) for arm in arms) for of in (min, max))
    if seeds == 1:
        return (
            "One seed is one split, one initialisation and one data order. Intervals here are over the rows of the "
            "test, which leaves all of that out: this shows that a run works, and proves little about which method "
            "is better."
        )
    some = str(seeds) if least_seeds == seeds else f"{least_seeds} to {seeds}"
    text = (
        f"Means and standard deviations are over {some} seeds, each with its own split, initialisation and data "
        "order; intervals are Student's, 95 %."
    )
    compared = [row.difference for row in rows if row.difference is not None and row.over == "seeds"]
    if not compared:
        return text
    pairs = min(difference.n for difference in compared)
    text += (
        f" Differences are taken within each seed. p-values are two-sided and corrected for "
        f"{count(len(compared), 'comparison')} (Holm). “Better” and “worse” go by the t-test at 5 %, which takes "
        "differences to be normally distributed; the sign-flip test does not"
    )
    least = min(1.0, 2.0 ** (1 - pairs) * len(compared))
    if least > 1 - statistics.CONFIDENCE:
        text += (
            f", but of {pairs} pairs its corrected p cannot be below {p_value(least)}, however large the difference: "
            "alone it could not call any of these significant"
        )
    return text + "."
