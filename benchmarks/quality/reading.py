"""What the figures of a grid say, and why, as far as they show it: in sentences made from the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.pooling import Pooled
from flexlora_fast.simulate import statistics, words
from flexlora_fast.simulate.charts import energy_at
from flexlora_fast.simulate.comparison import Arm, Part, Row
from flexlora_fast.simulate.results import Round
from flexlora_fast.simulate.statistics import Difference
from flexlora_fast.tables import natural

LONGER = 1.25  # times the reference's norm: from here on an update is called longer


@dataclass(frozen=True)
class Shape:
    """Of an arm's updates, means over the seeds; None where runs do not say.

    Attributes:
        smallest: the type of client with the smallest rank. energy: that it is sent, of the last update.
        first, last: effective rank after the first round with an update and after the last. norm: of the last.
        truncation: score of the largest type minus that of the smallest, of each seed (None where there is one type).
    """

    smallest: str
    energy: float | None
    first: float | None
    last: float | None
    norm: float | None
    truncation: Difference | None


def update(arm: Arm, part: Part) -> Shape:
    """What the arm's updates are like."""
    types = sorted({t for run in arm.runs for _, up in run.updates() for t in up.energy_kept}, key=natural)
    _, energy = arm.by_round(energy_at(types[0])) if types else (None, None)
    _, effective = arm.by_round(_effective)
    _, norms = arm.by_round(lambda line: None if line.update is None else line.update.norm)
    ends = [sorted(test.by_rank, key=natural) for test in arm.tests(part)]
    truncation = None
    if ends and all(len(names) > 1 for names in ends):
        scores = [
            [test.by_rank[names[i]].value for test, names in zip(arm.tests(part), ends, strict=True)] for i in (-1, 0)
        ]
        truncation = statistics.paired(scores[0], scores[1])
    known = effective.shape[1] > 0
    return Shape(
        smallest=types[0] if types else "–",
        energy=float(energy[:, -1].mean()) if energy is not None and energy.shape[1] else None,
        first=float(effective[:, 0].mean()) if known else None,
        last=float(effective[:, -1].mean()) if known else None,
        norm=float(norms[:, -1].mean()) if norms.shape[1] else None,
        truncation=truncation,
    )


def _effective(line: Round) -> float | None:
    return None if line.update is None else line.update.effective_rank


def of_setting(name: str, rows: Sequence[Row], part: Part) -> Iterator[str]:
    """Who is better and worse than the reference here, and what of the reference's own updates may be why."""
    reference = next((row for row in rows if row.difference is None), None)
    for sentence in words.findings(rows):
        yield f"{name}. {sentence}"
    if reference is None:
        return
    above = [row for row in rows if row.difference is not None and row.difference.mean > 0]
    if not above:
        yield f"{name}. No method has a higher mean than {reference.arm.label}."
        return
    shape = update(reference.arm, part)
    reasons = []
    if shape.energy is not None:
        reasons.append(
            f"clients of rank {shape.smallest} were sent {100 * shape.energy:.1f} % of the last update's energy"
        )
    if shape.truncation is not None:
        cost = shape.truncation
        told = "which the seeds do not tell from nothing" if cost.low <= 0 <= cost.high else "beyond chance"
        reasons.append(
            f"what the smallest rank was sent scores {words.points(-cost.mean)} points beside the largest "
            f"([{words.interval(_negated(cost))}], {told if cost.n > 1 else 'one seed'})"
        )
    if shape.first is not None and shape.last is not None:
        way = "falls" if shape.last < 0.9 * shape.first else "grows" if shape.last > 1.1 * shape.first else "stays"
        reasons.append(f"the effective rank {way}, {shape.first:.1f} → {shape.last:.1f}")
    names = ", ".join(row.arm.label for row in above)
    yield from _longer(name, above, shape, part)
    if reasons:
        yield (
            f"{name}. Of what could be why {names} {'has' if len(above) == 1 else 'have'} a higher mean than "
            f"{reference.arm.label}, truncation and rank collapse, its runs show: {'; '.join(reasons)}."
        )


def of_all(reference: str, pooled: Sequence[Pooled]) -> Iterator[str]:
    """Who is better and worse than the reference over all settings together, by the corrected t-test over seeds."""
    found = [each for each in pooled if each.t < 1 - statistics.CONFIDENCE]
    for word, sign in (("Worse", -1), ("Better", 1)):
        told = []
        for each in found:
            if sign * each.difference.mean > 0:
                agree, pairs = (each.above, each.below)[sign < 0], each.above + each.below
                told.append(
                    f"{each.label} ({words.gap(each.difference)}, in {agree} of {pairs} pairs of setting and seed, "
                    f"p {words.p_value(each.t)})"
                )
        if told:
            yield f"All settings together. {word} than {reference}: {', '.join(told)}."
    if pooled and not found:
        yield f"All settings together. No method is told from {reference} after correction."


def _longer(name: str, above: Sequence[Row], reference: Shape, part: Part) -> Iterator[str]:
    """Of methods with a higher mean, those whose updates are much larger: a longer step may be all of the gain."""
    if reference.norm is None:
        return
    norms = [(row.arm.label, update(row.arm, part).norm) for row in above]
    longer = [(label, norm / reference.norm) for label, norm in norms if norm and norm > LONGER * reference.norm]
    if longer:
        told = ", ".join(f"{label} {ratio:.1f} times" for label, ratio in longer)
        yield (
            f"{name}. The last update's ‖ΔW‖_F beside the reference's: {told}. With as few rounds as these a longer "
            "step may be all of the gain, which another learning rate would give as well."
        )


def _negated(found: Difference) -> statistics.Mean:
    return statistics.Mean(found.n, -found.mean, found.sd, -found.high, -found.low)
