"""GSM8K: grade school mathematics in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import reading
from flexlora_fast.simulate.tasks.answering import AnsweringOptions, AnsweringTask, best
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import from_hub
from flexlora_fast.simulate.tasks.reading import Entry

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "openai/gsm8k"
REMEDY = "take train.jsonl and test.jsonl from github.com/openai/grade-school-math, grade_school_math/data"
ANSWER = re.compile(r"#### (-?[0-9.,]+)")


class Gsm8kOptions(AnsweringOptions):
    """``path``: a folder with the authors' train.jsonl and test.jsonl; None takes the copy on the hub.

    ``max_new_tokens``: the authors' sampling code stops at 100 steps of a model that can calculate. Their longer
    solutions have over 200 tokens, and models write more. Targets are cut at half of ``model.max_length``, where the
    number at the end would be lost: take twice as many there.
    """

    path: Path | None = None
    max_new_tokens: int = Field(384, ge=1)


class Gsm8k(AnsweringTask):
    """The question and a line break, then the solution as published (with its ``<<48/2=24>>``), which ends in
    ``#### 72``. An answer is right whose first such number is the same text, commas aside. Nothing calculates for the
    model, unlike in the authors' sampling code.
    """

    name = "gsm8k"
    metric = "exact match"
    summary = "8,792 grade school problems in words; the final number counts"
    source = (
        "Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168 "
        "(github.com/openai/grade-school-math, dataset.py)"
    )
    Options: ClassVar[type[TaskOptions]] = Gsm8kOptions
    options: Gsm8kOptions

    def load(self, seed: int) -> Corpus:
        """The authors' split; nothing is drawn."""
        if self.options.path is None:
            parts = from_hub(HUB, ["question", "answer"], config="main")
            found = {part: _entries(part, rows) for part, rows in parts.items()}
        else:
            folder = self.options.path
            found = {part: list(reading.lines(folder / f"{part}.jsonl", REMEDY)) for part in ("train", "test")}
        train, test = _rows(found["train"]), _rows(found["test"])
        return Corpus(self.kind, train=train, test=test, metric=self.metric)

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """1 where the number is right, else 0."""
        return best(lambda answer, right: float(number(answer) == number(right)), predictions, rows)


def number(solution: str) -> str | None:
    """The number behind the first ``####``, without commas; None where there is none.

    >>> number("She has 1,000 left. #### 1,000")
    '1000'
    """
    found = ANSWER.search(solution)
    return found.group(1).replace(",", "") if found else None


def _entries(part: str, rows: Dataset) -> list[Entry]:
    return [Entry(f"{HUB}, {part}[{i}]", row, "give task.path instead") for i, row in enumerate(rows)]


def _rows(entries: Sequence[Entry]) -> Dataset:
    from datasets import Dataset

    for entry in entries:
        if number(entry.text("answer")) is None:
            raise entry.wrong("answer", "a solution that ends in '#### ' and a number")
    return Dataset.from_dict(
        {"prompt": [f"{x.text('question')}\n" for x in entries], "target": [x.text("answer") for x in entries]}
    )
