"""The TREC question classification set (Li & Roth, "Learning Question Classifiers", COLING 2002), and held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexlora_fast.errors import DataError

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


@dataclass(frozen=True)
class Question:
    """One example: a question and the index of its coarse class in ``LABELS``."""

    text: str
    label: int


def read_questions(path: Path) -> list[Question]:
    """The distinct questions of a label file, one ``COARSE:fine question`` a line in latin-1, in file order.

    The file repeats most questions up to five times; duplicates are dropped here (ignoring case), because a copy
    on both sides of the split would let the model be tested on what it was trained on.
    """
    questions: dict[str, Question] = {}
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
        name, _, text = line.strip().partition(" ")
        coarse, _, fine = name.partition(":")
        if coarse not in LABELS or not fine or not text:
            raise DataError(
                f"{path}:{number}: expected 'COARSE:fine question' with {' '.join(LABELS)}, found {line!r}; "
                "take the file as published"
            )
        questions.setdefault(text.strip().lower(), Question(text.strip(), LABELS.index(coarse)))
    return list(questions.values())


def hold_out(count: int, test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test examples: ``test`` of ``count``, drawn at random."""
    if not 0 < test < count:
        raise ValueError(f"cannot hold out {test} of {count} examples")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[test:]), np.sort(order[:test])
