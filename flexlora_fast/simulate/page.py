"""A report on one run, or on several compared: one HTML file that needs nothing else, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexlora_fast import __version__, files, memory
from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import comparison, page_charts, page_tables, results, words
from flexlora_fast.simulate.charts import TOGETHER
from flexlora_fast.simulate.comparison import Arm, Part
from flexlora_fast.simulate.results import Run
from flexlora_fast.tables import clean, count, number, percent, span


def write(
    folders: Sequence[str | Path], out: str | Path, reference: str | None = None, *, part: Part | None = None
) -> Path:
    """Write the report on the runs in these folders to ``out``, whole or not at all; returns its path.

    One folder gives the report of that run, several compare them: seeds of one method are put together, and methods
    are compared with ``reference`` (default: flexlora, else the first), by their scores on ``part`` (default: "test",
    else "unseen"). Runs that are still going are reported as far as they are. Raises ``ResultsError`` for what is not
    a run's folder, or a damaged one.
    """
    if not folders:
        raise OptionError("a report needs a run: give the folder of at least one")
    text = html([results.read(folder) for folder in folders], reference, part)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace(out, lambda to: Path(to).write_text(text, encoding="utf-8"))
    return out


def html(runs: Sequence[Run], reference: str | None = None, part: Part | None = None) -> str:
    """The page's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    arms = comparison.arms(runs)
    against = comparison.reference_of(arms, reference)
    arms.sort(key=lambda arm: arm is not against)  # the first in every figure
    part = part or ("test" if any(run.last() for run in runs) else "unseen")
    rows = comparison.compare(arms, against.label, part)
    environment = Environment(
        loader=PackageLoader("flexlora_fast.simulate", "."),
        autoescape=True,  # names come from clients
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "number": number, "percent": percent, "bytes": memory.show}
    return environment.get_template("page.html.j2").render(
        title=_title(arms),
        version=__version__,
        words=words,
        count=count,
        span=span,
        wide=len(arms) > TOGETHER,
        single=len(arms) == 1,
        arms=arms,
        run=against.runs[0],
        part=part,
        rows=rows,
        cards=_cards(arms[0], part) if len(arms) == 1 else _shared_cards(arms),
        findings=words.findings(rows),
        caveat=words.caveat(arms, rows),
        going=[run for run in runs if not run.finished],
        charts=page_charts.charts(arms, part),
        costs=page_tables.costs(arms),
        skew=page_tables.skew(against.runs[0]),
        categories=page_tables.categories(against.runs[0]),
        clients=page_tables.clients(against.runs[0], part),
        settings=page_tables.settings(arms),
    )


def _title(arms: Sequence[Arm]) -> str:
    names = list(dict.fromkeys(run.name for arm in arms for run in arm.runs))
    if len(names) > 3:
        names = [f"{names[0]} and {len(names) - 1} others"]
    return clean(", ".join(names))


def _cards(arm: Arm, part: Part) -> list[tuple[str, str, str]]:
    """Of one method: what, how much, and a remark."""
    cards = _shared_cards([arm])
    tests = arm.tests(part)
    if tests:
        (row,) = comparison.compare([arm], part=part)
        before = [found[0][1].value for each in arm.runs if (found := each.tests(part)) and found[0][0] == 0]
        remark = f"{words.share(sum(before) / len(before))} before training" if before else ""
        error = tests[0].stderr
        value = words.spread_of(row.final)
        if len(tests) == 1 and error is not None:
            value = f"{words.share(tests[0].value)} ± {words.share(error)}"
            remark = " · ".join(filter(None, ["± standard error over the rows", remark]))
        cards.insert(0, (f"final {tests[0].metric}, %", value, remark))
        best = f"round {'/'.join(map(str, row.best_rounds))}"
        cards.insert(1, (f"best {tests[0].metric}, %", words.spread_of(row.best), best))
    return cards


def _shared_cards(arms: Sequence[Arm]) -> list[tuple[str, str, str]]:
    run = arms[0].runs[0]
    rounds = [max((line.round for line in each.rounds), default=0) for arm in arms for each in arm.runs]
    planned = run.experiment.get("rounds")
    done = str(max(rounds)) if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    sampled = [len(line.sampled) for line in run.rounds if line.sampled]
    lost = sum(len(line.dropped) + len(line.refused) for line in run.rounds)
    seeds = sorted({seed for arm in arms for seed in arm.seeds})
    remark = f"{max(sampled)} a round" if sampled else ""
    remark += f", {lost} uploads missing or refused" if lost else ""
    cards = [
        ("rounds", done, f"of {planned}" if isinstance(planned, int) and planned != max(rounds) else ""),
        ("clients", str(len(run.clients)), remark),
        ("seeds", str(len(seeds)), ", ".join(map(str, seeds[:12]))) if len(seeds) > 1 else ("seed", str(seeds[0]), ""),
    ]
    if len(arms) > 1:
        return [("methods", str(len(arms)), ""), *cards]
    spent = sum(line.seconds.get("total", 0.0) for each in arms[0].runs for line in each.rounds)
    traffic = [each.traffic() for each in arms[0].runs]
    return [
        *cards,
        ("time", words.duration(spent), "all rounds" if len(arms[0].runs) == 1 else "all rounds and seeds"),
        ("sent", memory.show(sum(x.up for x in traffic)), f"up; {memory.show(sum(x.down for x in traffic))} down"),
    ]
