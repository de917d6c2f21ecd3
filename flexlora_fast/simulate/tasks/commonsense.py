"""Commonsense reasoning: eight sets of questions with given answers, one client each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import reading
from flexlora_fast.simulate.tasks.answering import AnsweringOptions, AnsweringTask
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.reading import Entry

if TYPE_CHECKING:
    from datasets import Dataset

REMEDY = "take the folder dataset/ of github.com/AGI-Edgerunners/LLM-Adapters, <set>/train.json and <set>/test.json"
_NUMBERED = {
    "piqa": ("solution", 2),
    "social_i_qa": ("answer", 5),
    "hellaswag": ("ending", 4),
    "winogrande": ("option", 2),
    "ARC-Easy": ("answer", 5),
    "ARC-Challenge": ("answer", 5),
    "openbookqa": ("answer", 5),
}
# The words that an answer is looked for among, by the set's folder.
CHOICES = {"boolq": ("true", "false")} | {
    name: tuple(f"{word}{i}" for i in range(1, count + 1)) for name, (word, count) in _NUMBERED.items()
}


class CommonsenseOptions(AnsweringOptions):
    """``path``: LLM-Adapters' folder dataset/. ``sets``: which of the eight; ``unseen``: those that nobody trains on.

    ``train``, ``test``: rows of a set at most.
    """

    path: Path
    sets: list[str] = Field(default_factory=lambda: list(CHOICES))
    unseen: list[str] = Field(default_factory=list)
    train: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(32, ge=1)

    @field_validator("sets", "unseen")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in CHOICES:
                raise ValueError(f"no set {name!r}; there are {', '.join(CHOICES)}")
        return names

    @model_validator(mode="after")
    def _some_train(self) -> CommonsenseOptions:
        if not set(self.sets) - set(self.unseen):
            raise ValueError("no set is left to train on; name some in sets that are not in unseen")
        return self


class Commonsense(AnsweringTask):
    """BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and OBQA as LLM-Adapters poses and scores them.

    The prompt is that of its evaluation, blanks included; that of its training differs by a comment for a linter that
    slipped into the text, and is not repeated. The target is "the correct answer is solution1". Of an answer the first
    of the set's choices counts that occurs in it; none is wrong. Answers are greedy, where the authors search with four
    beams.
    """

    name = "commonsense"
    metric = "accuracy"
    summary = "eight sets of commonsense questions with given answers, one client each"
    source = (
        "Hu et al., LLM-Adapters, EMNLP 2023, arXiv 2304.01933 "
        "(github.com/AGI-Edgerunners/LLM-Adapters, commomsense_evaluate.py)"
    )
    Options: ClassVar[type[TaskOptions]] = CommonsenseOptions
    options: CommonsenseOptions

    def load(self, seed: int) -> Corpus:
        """The published split; nothing is drawn: the first rows count where only some are wanted."""
        seen = [name for name in self.options.sets if name not in self.options.unseen]
        unseen = self.options.unseen
        return Corpus(
            self.kind,
            train=self._rows(seen, "train", self.options.train),
            test=self._rows(seen, "test", self.options.test),
            unseen=self._rows(unseen, "test", self.options.test) if unseen else None,
            metric=self.metric,
        )

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """1 where the first choice named is the right one, else 0."""
        pairs = zip(predictions, rows["answer"], rows["client"], strict=True)
        return np.array([float(chosen(text, name) == right) for text, right, name in pairs])

    def _rows(self, names: Sequence[str], part: str, most: int | None) -> Dataset:
        from datasets import Dataset

        found = [(name, entry) for name in names for entry in self._read(name, part)[:most]]
        return Dataset.from_dict(
            {
                "prompt": [prompt(entry.text("instruction")) for _, entry in found],
                "target": [entry.text("output") for _, entry in found],
                "answer": [entry.text("answer") for _, entry in found],
                "client": [name for name, _ in found],
            }
        )

    def _read(self, name: str, part: str) -> list[Entry]:
        entries = reading.array(self.options.path / name / f"{part}.json", REMEDY)
        for entry in entries:
            if entry.text("answer") not in CHOICES[name]:
                raise entry.wrong("answer", f"one of {', '.join(CHOICES[name])}")
        return entries


def prompt(instruction: str) -> str:
    """LLM-Adapters' prompt; lines after the first are indented by 16 blanks there."""
    indent = " " * 16
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        f"{indent}### Instruction:\n{indent}{instruction}\n\n{indent}### Response:\n{indent}"
    )


def chosen(text: str, name: str) -> str | None:
    """The first of the set's choices that occurs in the text; None where none does.

    >>> chosen("the correct answer is solution2, not solution1", "piqa")
    'solution2'
    """
    found = re.search("|".join(CHOICES[name]), text)
    return found.group() if found else None
