"""Runs put beside each other: which belong together (seeds), and how far each method is from the one compared with."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flexlora_fast.errors import OptionError, ResultsError
from flexlora_fast.simulate import statistics
from flexlora_fast.simulate.results import Round, Run, Test
from flexlora_fast.simulate.statistics import Difference, Mean

Part = Literal["test", "unseen"]
REFERENCE = "flexlora"
# What may differ between the seeds of one arm.
_OF_A_RUN = ("seed", "seeds")


@dataclass(frozen=True)
class Arm:
    """The runs of one method with the same settings, sorted by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def by_round(self, get: Callable[[Round], float | None]) -> tuple[np.ndarray, np.ndarray]:
        """Rounds (T,) for which every seed has the figure, and the figure, (seeds, T) float64."""
        found = [{line.round: get(line) for line in run.rounds} for run in self.runs]
        known = [{number for number, value in each.items() if value is not None} for each in found]
        rounds = sorted(set.intersection(*known))
        values = np.array([[each[number] for number in rounds] for each in found], dtype=np.float64)
        return np.array(rounds), values.reshape(len(self.runs), len(rounds))

    def tests(self, part: Part = "test") -> list[Test]:
        """Of each seed, the score of the last round that all of them have; empty where they have none in common."""
        numbers, _ = self.by_round(lambda line: value_of(line, part))
        if not len(numbers):
            return []
        return [dict(run.tests(part))[int(numbers[-1])] for run in self.runs]

    def mean(self, get: Callable[[Run], float | None]) -> Mean | None:
        """Over the seeds; None where a seed has no such figure."""
        found = [value for run in self.runs if (value := get(run)) is not None and math.isfinite(value)]
        return statistics.mean(found) if len(found) == len(self.runs) else None


@dataclass(frozen=True)
class Row:
    """One arm beside the reference.

    Attributes:
        final, loss: of the last round, over the seeds. best: of each seed's best round. best_round: of each seed.
        difference: this arm − the reference, paired (None for the reference, and where nothing can be paired).
        over: what the pairs are: seeds, or the rows of the test for one seed.
        t_holm, permutation_holm: the p-values of ``difference``, corrected for all rows of the table.
    """

    arm: Arm
    final: Mean
    loss: Mean | None
    best: Mean
    best_rounds: tuple[int, ...]
    difference: Difference | None
    over: Literal["seeds", "rows"]
    t_holm: float = math.nan
    permutation_holm: float = math.nan

    @property
    def verdict(self) -> Literal["better", "worse", "undecided", "reference"]:
        """By the corrected t-test over seeds at 5 %; one seed decides nothing."""
        if self.difference is None:
            return "reference"
        if self.over == "rows" or not self.t_holm < 1 - statistics.CONFIDENCE:
            return "undecided"
        return "better" if self.difference.mean > 0 else "worse"


def value_of(line: Round, part: Part = "test") -> float | None:
    """The round's score."""
    test: Test | None = getattr(line, part)
    return None if test is None else test.value


def loss_of(line: Round, part: Part = "test") -> float | None:
    """The round's mean loss on the test."""
    test: Test | None = getattr(line, part)
    return None if test is None else test.loss


def arms(runs: Sequence[Run]) -> list[Arm]:
    """Runs that differ in nothing but the seed are one arm; in the order of their first run.

    An arm is called by what tells it from the others: its experiment's name, its method, or the settings that differ.

    Raises ``ResultsError`` for two runs of one arm with the same seed, which would count twice.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(json.dumps(settings(run), sort_keys=True, default=str), []).append(run)
    groups = [sorted(group, key=lambda run: run.seed) for group in grouped.values()]
    for group in groups:
        for one, other in itertools.pairwise(group):
            if one.seed == other.seed:
                raise ResultsError(
                    f"{one.folder} and {other.folder} are the same experiment with the same seed {one.seed}; "
                    "give one of them"
                )
    labels = _labels([group[0] for group in groups])
    return [Arm(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def settings(run: Run) -> dict[str, Any]:
    """The experiment without what may differ between the seeds of an arm."""
    return {key: value for key, value in run.experiment.items() if key not in _OF_A_RUN}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names.

    >>> flat({"train": {"lr": 0.1, "steps": 5}, "name": "x"})
    {'train.lr': 0.1, 'train.steps': 5, 'name': 'x'}
    """
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _labels(runs: Sequence[Run]) -> list[str]:
    for labels in ([run.name for run in runs], [run.method for run in runs]):
        if len(set(labels)) == len(runs):
            return labels
    every = [flat(settings(run)) for run in runs]
    names = dict.fromkeys(name for each in every for name in each)
    differ = [name for name in names if len({json.dumps(each.get(name), default=str) for each in every}) > 1]
    return [", ".join(f"{name.split('.')[-1]} {each.get(name, 'default')}" for name in differ) for each in every]


def compare(found: Sequence[Arm], reference: str | None = None, part: Part = "test") -> list[Row]:
    """Each arm beside the reference (see :func:`reference_of`), in the arms' order.

    Where there are several seeds, pairs are those that both arms have. With one seed, pairs are the rows of the test,
    whose spread leaves out splits, initialisations and data orders.

    Raises ``OptionError`` for a reference that is not there, ``ResultsError`` for runs of one seed that were tested on
    other rows, or by other metrics.
    """
    against = reference_of(found, reference)
    rows = [_row(arm, against, part) for arm in found if arm.tests(part)]
    t = statistics.holm([row.difference.t_p if row.difference else math.nan for row in rows])
    permuted = statistics.holm([row.difference.permutation_p if row.difference else math.nan for row in rows])
    return [
        Row(r.arm, r.final, r.loss, r.best, r.best_rounds, r.difference, r.over, t_holm, permutation_holm)
        for r, t_holm, permutation_holm in zip(rows, t, permuted, strict=True)
    ]


def reference_of(found: Sequence[Arm], name: str | None = None) -> Arm:
    """The arm of that name; without one, the one called flexlora, else the first."""
    by_label = {arm.label: arm for arm in found}
    if name is not None and name not in by_label:
        raise OptionError(f"no run is called {name!r} to compare with; there are {', '.join(by_label)}")
    return by_label.get(name or REFERENCE, found[0])


def _row(arm: Arm, reference: Arm, part: Part) -> Row:
    tests = arm.tests(part)
    losses = [test.loss for test in tests if test.loss is not None]
    bests = [best for run in arm.runs if (best := run.best(part)) is not None]
    difference, over = (None, "seeds") if arm is reference else _difference(arm, reference, part)
    return Row(
        arm=arm,
        final=statistics.mean([test.value for test in tests]),
        loss=statistics.mean(losses) if len(losses) == len(tests) else None,
        best=statistics.mean([test.value for _, test in bests]),
        best_rounds=tuple(number for number, _ in bests),
        difference=difference,
        over=over,
    )


def _check_alike(run: Run, other: Run, part: Part) -> None:
    """Raise ``ResultsError`` where scores of two runs cannot be taken from each other."""
    a, b = run.last(part), other.last(part)
    rows = [each.tested.get(part) for each in (run, other)]
    if a is not None and b is not None and a.metric != b.metric:
        what = f"scored by {a.metric} and by {b.metric}"
    elif None not in rows and rows[0] != rows[1]:
        what = "tested on different rows"
    else:
        return
    raise ResultsError(
        f"{run.folder} and {other.folder} were {what}; compare runs of one task, with the same [task] and "
        "evaluation.limit"
    )


def _difference(arm: Arm, reference: Arm, part: Part) -> tuple[Difference | None, Literal["seeds", "rows"]]:
    ours = dict(zip(arm.seeds, arm.tests(part), strict=True))
    theirs = dict(zip(reference.seeds, reference.tests(part), strict=False))
    common = sorted(ours.keys() & theirs.keys())
    for seed in common:
        _check_alike(arm.runs[arm.seeds.index(seed)], reference.runs[reference.seeds.index(seed)], part)
    if len(common) > 1:
        found = statistics.paired([ours[seed].value for seed in common], [theirs[seed].value for seed in common])
        return found, "seeds"
    if len(common) == 1:
        one, other = (each.runs[each.seeds.index(common[0])].scores.get(part) for each in (arm, reference))
        if one is not None and other is not None and one.shape == other.shape:
            return statistics.paired(one, other), "rows"
    return None, "rows"
