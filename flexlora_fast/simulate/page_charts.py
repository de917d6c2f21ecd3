"""Which figures a report has, and what each shows in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora_fast.simulate import charts as draw
from flexlora_fast.simulate import svg, words
from flexlora_fast.simulate.comparison import Arm, Part
from flexlora_fast.tables import clean, count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A figure, ready for the page, with what it shows in words."""

    title: str
    text: str
    image: str


def charts(arms: Sequence[Arm], part: Part) -> list[Chart]:
    """Those that these runs have figures for."""
    found = []
    for i, (title, text, made) in enumerate(_figures(arms, part)):
        if made is not None:
            found.append(Chart(title, text, svg.inline(made, f"chart-{i}", f"{title}. {text}")))
    return found


def _figures(arms: Sequence[Arm], part: Part) -> Iterator[tuple[str, str, Figure | None]]:
    palette, single = svg.PAGE, len(arms) == 1
    metric = clean(next((run.metric for arm in arms for run in arm.runs if run.last(part)), "metric"))
    if any(arm.tests(part) for arm in arms):
        yield f"{metric} by round".capitalize(), _ends(arms, part) + _bands(arms), draw.score(arms, palette, part)
        beside = "On the test rows, and in training." if single else "On the test rows."
        yield "Loss by round", beside, draw.loss(arms, palette, part)
    if part == "test" and any(arm.tests("unseen") for arm in arms):
        text = _ends(arms, "unseen") + " On rows of clients that never train."
        yield f"{metric} on unseen clients".capitalize(), text, draw.score(arms, palette, "unseen")
    kept = "The share of ‖ΔW‖² that an adapter of each rank can hold, by round; what is missing is cut off."
    yield "Energy kept by rank", kept if single else f"{kept} At the smallest rank.", draw.energy(arms, palette)
    collapse = (
        "How many directions the update has: exp of the entropy of σ/Σσ. Where it falls towards the smallest "
        "rank of the clients, the larger ones are wasted (rank collapse)."
    )
    yield "Effective rank", collapse, draw.effective_rank(arms, palette)
    of = "some rounds" if single else "the last round"
    text = f"Singular values of the largest layer, of {of}, over the largest one."
    yield (
        "Spectrum of the update",
        text + (f" Seed {arms[0].seeds[0]}." if _seeds(arms) else ""),
        draw.spectrum(arms, palette),
    )
    text = "What clients of each rank are sent after the last round, tested on the same rows."
    yield f"{metric} by rank".capitalize(), text, draw.by_rank(arms, palette, part)
    text = "What training, aggregation and testing take of a round, on the machine that ran it."
    yield "Seconds a round", text, draw.seconds(arms, palette)


def _seeds(arms: Sequence[Arm]) -> bool:
    return any(len(arm.runs) > 1 for arm in arms)


def _ends(arms: Sequence[Arm], part: Part) -> str:
    """First and last value of one arm, or the range of the last over several."""
    if len(arms) > 1:
        last = [sum(test.value for test in tests) / len(tests) for arm in arms if (tests := arm.tests(part))]
        return f"After the last round from {words.share(min(last))} to {words.share(max(last))} %." if last else ""
    runs = [found for run in arms[0].runs if (found := run.tests(part))]
    if not runs:
        return ""
    # Of several seeds the means, of those that are as far as the first.
    begun, ended = runs[0][0][0], runs[0][-1][0]
    alike = [found for found in runs if (found[0][0], found[-1][0]) == (begun, ended)]
    start, end = (sum(found[i][1].value for found in alike) / len(alike) for i in (0, -1))
    return f"From {words.share(start)} % (round {begun}) to {words.share(end)} % (round {ended})."


def _bands(arms: Sequence[Arm]) -> str:
    if _seeds(arms):
        return f" Mean of {count(max(len(arm.runs) for arm in arms), 'seed')}; bands: 95 % interval of the mean."
    return " Bands: 95 % interval over the rows of the test."
