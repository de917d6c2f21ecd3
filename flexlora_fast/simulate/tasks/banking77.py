"""BANKING77: what a bank's customer wants."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

from flexlora_fast.errors import DataError, shown
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import TextTask, from_hub, text_corpus

# A copy in JSON Lines: the authors' own (PolyAI/banking77) is a script, which ``datasets`` no longer runs.
HUB = "mteb/banking77"
HEADER = ["text", "category"]
REMEDY = "take train.csv and test.csv from github.com/PolyAI-LDN/task-specific-datasets, banking_data"


class Banking77Options(TaskOptions):
    """``path``: a folder with the authors' train.csv and test.csv; None takes the copy on the hub."""

    path: Path | None = None


class Banking77(TextTask):
    """The authors' split: 10,003 questions to train on, 3,080 to test on. Classes in the hub's order, by name without
    regard to case.
    """

    name = "banking77"
    summary = "13,083 questions to a bank, 77 classes of what is wanted"
    source = "Casanueva et al., Efficient Intent Detection with Dual Sentence Encoders, arXiv 2003.04807"
    Options: ClassVar[type[TaskOptions]] = Banking77Options
    options: Banking77Options

    def load(self, seed: int) -> Corpus:
        """The corpus; nothing is drawn."""
        if self.options.path is None:
            parts = from_hub(HUB, ["text", "label_text"])
            train, test = (
                list(zip(parts[name]["text"], parts[name]["label_text"], strict=True)) for name in ("train", "test")
            )
        else:
            train, test = (read(self.options.path / f"{name}.csv") for name in ("train", "test"))
        labels = sorted({category for _, category in train}, key=str.casefold)
        number = {category: i for i, category in enumerate(labels)}
        for row, (text, category) in enumerate(test, start=1):
            if category not in number:
                raise DataError(
                    f"{self.options.path or HUB}: question {row} of the test set ({shown(text)}) is of category "
                    f"{category!r}, which no question of the training set is of; {REMEDY}"
                )
        return text_corpus(
            [(text, number[category]) for text, category in train],
            [(text, number[category]) for text, category in test],
            labels,
        )


def read(path: Path) -> list[tuple[str, str]]:
    """Questions and categories of one of the authors' files. Raises ``DataError``."""
    rows: list[tuple[str, str]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if header != HEADER:
                raise DataError(f"{path}:1: the header is {header}, not {HEADER}; {REMEDY}")
            for row in reader:
                if len(row) != 2 or not all(field.strip() for field in row):
                    raise DataError(f"{path}:{reader.line_num}: {shown(row)} is not a text and a category; {REMEDY}")
                rows.append((row[0], row[1]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    if not rows:
        raise DataError(f"{path}: has no question; {REMEDY}")
    return rows
