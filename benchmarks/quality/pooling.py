"""Each method's difference to the reference over all settings of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexlora_fast.simulate import statistics
from flexlora_fast.simulate.comparison import Part, Row
from flexlora_fast.simulate.statistics import Difference


@dataclass(frozen=True)
class Pooled:
    """An arm's difference to the reference over all settings: ``difference`` is over seeds, each with its mean over the
    settings (within a seed these share their clients' initialisation and the held-out rows, and are not independent),
    with both p-values corrected. ``above`` and ``below`` count (setting, seed).
    """

    label: str
    difference: Difference
    t: float
    permuted: float
    above: int
    below: int


def together(settings: Sequence[Sequence[Row]], part: Part) -> list[Pooled]:
    """Of each arm and seed that all settings have, as they and the reference scored on ``part``."""
    found: list[tuple[str, Difference, list[float]]] = []
    for row in settings[0]:
        scores = [_both(rows, row.arm.label, part) for rows in settings]
        seeds = sorted(set.intersection(*(set(each) for each in scores)))
        if row.difference is not None and seeds:
            table = np.array([[each[seed] for seed in seeds] for each in scores])  # (settings, seeds, 2)
            gaps = np.round(table[..., 0] - table[..., 1], 12).flatten().tolist()
            found.append((row.arm.label, statistics.paired(*table.mean(axis=0).T), gaps))
    t = statistics.holm([difference.t_p for _, difference, _ in found])
    permuted = statistics.holm([difference.permutation_p for _, difference, _ in found])
    return [
        Pooled(label, difference, *p, sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
        for (label, difference, gaps), *p in zip(found, t, permuted, strict=True)
    ]


def _both(setting: Sequence[Row], label: str, part: Part) -> dict[int, tuple[float, float]]:
    """By seed that both have: the final scores of that arm and of the reference."""
    rows = {row.arm.label: row for row in setting}
    reference = next((row for row in setting if row.difference is None), None)
    if label not in rows or reference is None:
        return {}
    ours, theirs = (
        dict(zip(row.arm.seeds, (test.value for test in row.arm.tests(part)), strict=True))
        for row in (rows[label], reference)
    )
    return {seed: (ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()}
